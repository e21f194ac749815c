"""For tests: inner fields of manifests of versions that are never loaded."""

from typing import Any

VOCABULARY: dict[str, Any] = {
    "size": 4,
    "embedding_rows": 4,
    "special_tokens": {"bos": None, "eos": None, "pad": None, "unk": None, "stop": []},
}
PROBE: dict[str, Any] = {
    "output": "logits",
    "input_ids": [[0, 1]],
    "vocabulary_size": 4,
    "vocabulary_ids": [0],
    "atol": 1e-3,
    "rtol": 1e-3,
    "expected": [[0.5, 1.5]],
}
