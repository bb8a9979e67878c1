"""Settings that hold for every test: few, repeatable Hypothesis examples and no time limit on a busy machine."""

from hypothesis import settings

settings.register_profile("micelab", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("micelab")
