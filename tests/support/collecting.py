"""Which modules collecting the tests imports: each run, and each of its processes, waits for them."""

from __future__ import annotations

import pytest

# Tests import these where they use them. `tests/conftest.py` imports the models of transformers before the first test.
SLOW_TO_IMPORT = {
    *("transformers.modeling_utils", "transformers.models.auto.modeling_auto", "torch._dynamo", "sympy"),
    *("compressed_tensors", "llmcompressor", "datasets", "pyarrow", "matplotlib", "mkdocs"),
}
IMPORTED = pytest.StashKey[set[str]]()
