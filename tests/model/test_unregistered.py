"""Without moecompress, transformers must refuse a compressed folder: it would fill the experts with random numbers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import roundtrip
from tiny import head_class, tiny_checkpoint

#: Per-expert and fused on disk, transposed, without a gate, with biases, converted under the same name when loading.
LAYOUTS = ("mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "granitemoe", "qwen3_vl_moe", "aria", "gemma4")
#: Runs in a process that never imports moecompress; says what became of each folder.
SCRIPT = """
import json, sys, transformers
results = {}
for family, head, folder in json.loads(sys.argv[1]):
    try:
        getattr(transformers, head).from_pretrained(folder)
        results[family] = "loaded"
    except Exception as error:
        results[family] = f"{type(error).__name__}: {error}"
strange = [name for name in sys.modules if name.startswith("moecompress")]
strange += [repr(finder) for finder in sys.meta_path if "moecompress" in type(finder).__module__]
print(json.dumps({"results": results, "strange": strange}))
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Family -> what plain transformers said to its compressed folder."""
    where = tmp_path_factory.mktemp("unregistered")
    jobs = []
    for family in LAYOUTS:
        config = tiny_checkpoint(family, where / family)
        tokens = roundtrip.tokens(config.get_text_config().vocab_size)
        job = roundtrip.pipeline.make_job(str(where / family), roundtrip.SMALL, tokens=tokens)
        roundtrip.pipeline.quantize(job, where / f"{family}-packed")
        jobs.append((family, head_class(family).__name__, str(where / f"{family}-packed")))
    ran = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(jobs)], capture_output=True, text=True, cwd=where)
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout.splitlines()[-1])
    assert not record["strange"], "moecompress was imported: this proves nothing"
    return record["results"]


@pytest.mark.parametrize("family", LAYOUTS)
def test_plain_transformers_refuses(family: str, outcome: dict[str, str]) -> None:
    assert outcome[family] != "loaded"
    assert "mismatch" in outcome[family].lower(), outcome[family]
