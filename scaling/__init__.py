"""How much a visual token buys: fits of score against m, the theory of divergence, trade-offs and a planner."""

from typing import TYPE_CHECKING

from fusedvlm.lazy import lazy_names

# Public name -> module that defines it. Loaded on first use, so that command-line help stays instant.
_PUBLIC = {
    "Curve": ".score_records",
    "ScoreRecord": ".score_records",
    "group_curves": ".score_records",
    "read_scores": ".score_records",
    "CurveFit": ".laws.fit",
    "HeldOutError": ".laws.fit",
    "PowerLawFit": ".laws.fit",
    "bootstrap_power_law": ".laws.fit",
    "fit_curve": ".laws.fit",
    "fit_power_law": ".laws.fit",
    "held_out_error": ".laws.fit",
    "predict_interval": ".laws.fit",
    "FittedLaw": ".laws.law_forms",
    "fit_law": ".laws.law_forms",
    "rank_laws": ".laws.law_forms",
    "Dependency": ".divergence.theory",
    "alpha_from_upsilon": ".divergence.theory",
    "fit_lambda": ".divergence.theory",
    "upsilon": ".divergence.theory",
    "DivergenceResult": ".divergence.estimators",
    "DivergenceStatistics": ".divergence.estimators",
    "pair_curves": ".divergence.estimators",
    "summarize": ".divergence.estimators",
    "ImageBranches": ".divergence.branches",
    "TextBranches": ".divergence.branches",
    "GridCell": ".tradeoff.fit_tradeoff",
    "TradeoffFit": ".tradeoff.fit_tradeoff",
    "choices_for_budget": ".tradeoff.fit_tradeoff",
    "fit_tradeoff": ".tradeoff.fit_tradeoff",
    "optimal_visual_tokens": ".tradeoff.fit_tradeoff",
    "read_grid": ".tradeoff.fit_tradeoff",
    "Budget": ".tradeoff.planner",
    "Cost": ".tradeoff.planner",
    "Plan": ".tradeoff.planner",
    "make_plan": ".tradeoff.planner",
    "parse_budget": ".tradeoff.planner",
    "read_costs": ".tradeoff.planner",
    "read_curves": ".tradeoff.planner",
    "Flops": "fusedvlm.costs.counts",
    "Shapes": "fusedvlm.costs.counts",
    "count_flops": "fusedvlm.costs.counts",
    "kv_cache_bytes": "fusedvlm.costs.counts",
    "read_shapes": "fusedvlm.costs.counts",
    "cluster_curves": ".laws.compare_curves",
    "input_effects": ".laws.compare_curves",
    "latency_against_m": ".report.figures",
    "save_figure": "fusedvlm.charts",
    "score_against_m": ".report.figures",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from fusedvlm.charts import save_figure as save_figure
    from fusedvlm.costs.counts import (
        Flops as Flops,
        Shapes as Shapes,
        count_flops as count_flops,
        kv_cache_bytes as kv_cache_bytes,
        read_shapes as read_shapes,
    )

    from .divergence.branches import (
        ImageBranches as ImageBranches,
        TextBranches as TextBranches,
    )
    from .divergence.estimators import (
        DivergenceResult as DivergenceResult,
        DivergenceStatistics as DivergenceStatistics,
        pair_curves as pair_curves,
        summarize as summarize,
    )
    from .divergence.theory import (
        Dependency as Dependency,
        alpha_from_upsilon as alpha_from_upsilon,
        fit_lambda as fit_lambda,
        upsilon as upsilon,
    )
    from .laws.compare_curves import (
        cluster_curves as cluster_curves,
        input_effects as input_effects,
    )
    from .laws.fit import (
        CurveFit as CurveFit,
        HeldOutError as HeldOutError,
        PowerLawFit as PowerLawFit,
        bootstrap_power_law as bootstrap_power_law,
        fit_curve as fit_curve,
        fit_power_law as fit_power_law,
        held_out_error as held_out_error,
        predict_interval as predict_interval,
    )
    from .laws.law_forms import (
        FittedLaw as FittedLaw,
        fit_law as fit_law,
        rank_laws as rank_laws,
    )
    from .report.figures import (
        latency_against_m as latency_against_m,
        score_against_m as score_against_m,
    )
    from .score_records import (
        Curve as Curve,
        ScoreRecord as ScoreRecord,
        group_curves as group_curves,
        read_scores as read_scores,
    )
    from .tradeoff.fit_tradeoff import (
        GridCell as GridCell,
        TradeoffFit as TradeoffFit,
        choices_for_budget as choices_for_budget,
        fit_tradeoff as fit_tradeoff,
        optimal_visual_tokens as optimal_visual_tokens,
        read_grid as read_grid,
    )
    from .tradeoff.planner import (
        Budget as Budget,
        Cost as Cost,
        Plan as Plan,
        make_plan as make_plan,
        parse_budget as parse_budget,
        read_costs as read_costs,
        read_curves as read_curves,
    )
else:
    __getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
