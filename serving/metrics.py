"""What the server counts, in Prometheus' text form."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .api_messages import Usage
from .visual_encoder import VisualEncoder

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, encoder: VisualEncoder) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = Counter("fusedvlm_requests", "Chat completions by HTTP status.", ["status"], **own)
        self.running = Gauge("fusedvlm_requests_running", "Requests that are being read, encoded or answered.", **own)
        self.seconds = Histogram("fusedvlm_request_seconds", "Whole requests.", buckets=SECONDS, **own)
        self.first = Histogram("fusedvlm_first_token_seconds", "To the first text.", buckets=SECONDS, **own)
        self.encoding = Histogram("fusedvlm_encode_seconds", "Waiting and encoding.", buckets=SECONDS, **own)
        self.prompt = Counter("fusedvlm_prompt_tokens", "Prompt tokens, visual ones included.", **own)
        self.visual = Histogram("fusedvlm_visual_tokens", "Visual tokens of a request.", buckets=COUNTS, **own)
        self.completion = Counter("fusedvlm_completion_tokens", "New tokens.", **own)
        self.batch = Histogram("fusedvlm_encoder_batch", "Requests in one pass of the encoder.", buckets=COUNTS, **own)
        counts, cache = encoder.counts, encoder.cache
        for name, text, read in (
            ("tower_images", "Pictures that went through the vision tower.", lambda: counts.tower_images),
            ("tower_views", "Views that went through the vision tower.", lambda: counts.views),
            ("fused_questions", "Questions that the connector read.", lambda: counts.questions),
            ("visual_cache_hits", "Found in the visual cache.", lambda: cache.hits),
            ("visual_cache_misses", "Not found in the visual cache.", lambda: cache.misses),
            ("visual_cache_bytes", "Bytes in the visual cache.", lambda: cache.num_bytes),
            ("visual_cache_entries", "Entries of the visual cache.", lambda: len(cache)),
        ):
            Gauge(f"fusedvlm_{name}", text, **own).set_function(read)

    def add(self, usage: Usage) -> None:
        """Count the tokens of an answered request."""
        self.prompt.inc(usage.prompt)
        self.completion.inc(usage.completion)
        if usage.visual:
            self.visual.observe(usage.visual)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)
