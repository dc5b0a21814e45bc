"""Settings of the whole test suite: hypothesis examples are the same in every run."""

from hypothesis import settings

settings.register_profile("llmengine", derandomize=True, deadline=None, max_examples=40, print_blob=True)
settings.load_profile("llmengine")
