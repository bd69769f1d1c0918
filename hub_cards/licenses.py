"""Which license and notice files must travel with weights, by license of the language model.

A reading of the license texts, not legal advice. License texts of others are not part of this package: whoever accepted
one has it as a file and states where (`license_files` in facts.yaml, or --license-file).
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .facts import CountedFacts, StatedFacts

APACHE = "apache-2.0"
CODE_LICENSE = "LICENSE-CODE"
# What the Hub accepts in a card's metadata.
LICENSES = set(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr isc h-research intel-research
    lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1
    ncsa unlicense zlib pddl deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 gemma unknown other
    """.split()  # noqa: SIM905 - a list of them would be five times as long
)
# The same text as the package's own LICENSE, which an installed package does not have at hand.
APACHE_TEXT = Path(__file__).parent / "templates" / "apache-2.0.md"
# OpenAI's CLIP towers: their repositories state no license, the code they came with is under this one.
CLIP_PREFIX, CLIP_TEXT = "openai/clip-", Path(__file__).parent / "templates" / "clip-mit.md"


@dataclass(frozen=True)
class Terms:
    """What a license asks of those who pass weights on.

    Args:
        title: the license in words.
        phrase: words that its text contains, so that a wrong file is noticed.
        notice: sentence that a NOTICE file must have.
        policy: address of its acceptable use policy.
        say: what the card tells users about it.
    """

    title: str
    phrase: str
    notice: str
    policy: str
    say: str


def _llama_3(number: str) -> Terms:
    return Terms(
        title=f"Llama {number} Community License Agreement",
        phrase=f"llama {number} community license",
        notice=f"Llama {number} is licensed under the Llama {number} Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
        policy=f"https://www.llama.com/llama{number.replace('.', '_')}/use-policy/",
        say="Built with Llama. The agreement limits use by very large services and asks that models made from these "
        "weights or their answers have names that begin with Llama.",
    )


TERMS = {
    "llama2": Terms(
        title="Llama 2 Community License Agreement",
        phrase="llama 2 community license",
        notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
        "All Rights Reserved.",
        policy="https://ai.meta.com/llama/use-policy/",
        say="The agreement limits use by very large services, and neither the weights nor their answers may be used to "
        "improve language models other than Llama 2 and its derivatives.",
    ),
    **{f"llama{number}": _llama_3(number) for number in ("3", "3.1", "3.2", "3.3", "4")},
    "gemma": Terms(
        title="Gemma Terms of Use",
        phrase="gemma terms of use",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        policy="https://ai.google.dev/gemma/prohibited_use_policy",
        say="The terms and their use restrictions go on to everybody who receives these weights.",
    ),
}
# Language models whose license is known from their name; a variant of one cannot be published with it unstated.
KNOWN_PREFIXES = {"meta-llama/Llama-2": "llama2", "lmsys/vicuna": "llama2", "meta-llama/": "llama3"}


def check_stated(stated: StatedFacts, counted: CountedFacts) -> None:
    """Raise `ValueError`, with the fix, for licenses that are missing or contradict each other."""
    if stated.license is None:
        raise ValueError(
            "No license is stated, and there is no default; write `license: apache-2.0` (or whichever is right) into "
            "facts.yaml beside the variant, or give --license."
        )
    if stated.license not in LICENSES:
        raise ValueError(
            f"The Hub knows no license {stated.license!r}{_similar(stated.license)}; for one that it does not list, "
            "state `license: other` with license_name and license_link."
        )
    if stated.license == "other" and not (stated.license_name and stated.license_link):
        raise ValueError("license: other also needs license_name and license_link in facts.yaml.")
    if stated.license_link and not stated.license_link.startswith(("https://", "http://", "LICENSE")):
        raise ValueError(f"license_link {stated.license_link!r} must start with https://, or be LICENSE.")
    name = counted.language_model.repo or ""
    known = next((known for prefix, known in KNOWN_PREFIXES.items() if name.startswith(prefix)), None)
    if known and stated.llm_license is None:
        raise ValueError(
            f"The license of the language model {name} is not stated; it asks for things to be passed on. Write "
            f"`llm_license: {known}` (check which) into facts.yaml, or give --llm-license."
        )
    if stated.llm_license in TERMS and stated.license != stated.llm_license:
        raise ValueError(
            f"license is {stated.license}, but the language model is under {stated.llm_license}, which goes on to what "
            f"is made from it; state `license: {stated.llm_license}`."
        )


def noncommercial(stated: StatedFacts) -> list[str]:
    """Names of training data that may not be used commercially, going by the licenses stated."""
    marks = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non-?commercial|research only", re.IGNORECASE)
    return [dataset.name for dataset in stated.datasets if dataset.license and marks.search(dataset.license)]


def _similar(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), LICENSES, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def terms_of(license: object) -> "Terms | None":
    """What a license asks for; None for one without further terms, and for what names no license."""
    return TERMS.get(license) if isinstance(license, str) else None


def license_texts(stated: StatedFacts, counted: CountedFacts) -> dict[str, bytes]:
    """{name in the repository: content} of the license and notice files.

    Raises:
        ValueError: when a license is missing, contradicts another, or its text was not given, with the fix.
    """
    check_stated(stated, counted)
    texts = {CODE_LICENSE: APACHE_TEXT.read_bytes()}
    texts |= _given(stated.license_files)
    terms = terms_of(stated.license)
    if terms is not None:
        _check_agreement(stated, terms)
    elif stated.license == APACHE:
        texts.setdefault("LICENSE", APACHE_TEXT.read_bytes())
    notice = _notice(terms, counted)
    if "NOTICE" in texts and terms is not None and terms.notice not in texts["NOTICE"].decode():
        raise ValueError(f"The NOTICE file given lacks the sentence that the license asks for: {terms.notice}")
    return {"NOTICE": notice.encode(), **texts} if notice else texts


def expected_notice(stated: StatedFacts, counted: CountedFacts) -> str:
    """What a NOTICE file must say for these licenses; empty when nothing must be said."""
    return _notice(terms_of(stated.license), counted)


def _check_agreement(stated: StatedFacts, terms: Terms) -> None:
    """Raise `ValueError` when the text of an agreement that must travel along was not given."""
    if not stated.license_files:
        raise ValueError(
            f"The {terms.title} asks for a copy of its text in the repository; give the file with --license-file, or "
            "as license_files: [path] in facts.yaml."
        )
    text = Path(stated.license_files[0]).read_text(encoding="utf-8")
    if terms.phrase not in " ".join(text.lower().split()):
        raise ValueError(f"{stated.license_files[0]} does not read like the {terms.title}; give that text first.")


def _given(paths: Sequence[str]) -> dict[str, bytes]:
    """Stated license files under their names in the repository, the first as LICENSE."""
    texts: dict[str, bytes] = {}
    for number, path in enumerate(map(Path, paths)):
        name = "LICENSE" if number == 0 else path.name
        if not path.is_file():
            raise ValueError(f"{path}: no such license file.")
        if name in texts or name == CODE_LICENSE or path.suffix not in ("", ".md", ".txt"):
            raise ValueError(f"{path}: cannot stand in the repository as {name}; rename it, as .txt or .md.")
        try:
            texts[name] = path.read_text(encoding="utf-8").encode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: a license file must be text in UTF-8 ({error.reason}).") from error
    return texts


def _notice(terms: Terms | None, counted: CountedFacts) -> str:
    """What must be said about the parts made by others; empty when nothing must."""
    parts = []
    if terms is not None:
        model = counted.language_model
        name = model.repo or f"a {model.type} model"
        where = "are in" if counted.self_contained else "are not in"
        parts += [
            terms.notice,
            f"The weights of the language model ({name}) {where} this repository; its tokenizer files are. Fusion "
            "module, projection and vision tower were trained or adapted by the publisher of this repository. The "
            f"Python files are under Apache-2.0, see {CODE_LICENSE}.",
        ]
    if (counted.vision.repo or "").startswith(CLIP_PREFIX):
        parts.append(f"The vision tower is made from {counted.vision.repo}:\n\n{CLIP_TEXT.read_text(encoding='utf-8')}")
    return "\n\n".join(parts) + "\n" if parts else ""
