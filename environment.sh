# shellcheck shell=bash
# Source this from anywhere: it makes the development environment if needed, installs this checkout into it
# (editable, with the CUDA extension where nvcc is) and sets
#
#   PYTHON   the interpreter to use
#
# First time: minutes, and a network to a Python package index. After that: a second or two.
#
#   DEEPEP_MOE_PYTHON=/path/to/python  use this interpreter and its packages; only this checkout is installed into it
#   DEEPEP_MOE_CUDA=0|1                skip | require the CUDA extension (setup.py says more)
#
# Where python3 has a torch that sees a GPU, .venv is built on top of it, so that its torch is the one in use.

_repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

_say() { printf 'set-up: %s\n' "$*" >&2; }

_stop() {
    _say "$*"
    exit 1
}

_sees_gpu() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

_pip() { "$PYTHON" -m pip --disable-pip-version-check --no-input "$@"; }

_base_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            "$name" -c "import sys; print(sys.executable)"
            return
        fi
    done
    _stop "needs Python 3.11, 3.12 or 3.13; none found in PATH"
}

# .venv with the locked packages; its own torch, or the torch of the Python beneath it
_make_venv() {
    local lock="$_repo/requirements-dev.lock" base stamp torch_version
    if _sees_gpu python3; then base=$(command -v python3); else base=$(_base_python) || exit 1; fi
    PYTHON="$_repo/.venv/bin/python"
    stamp="$(sha256sum <"$lock" | cut -c1-16) $base"
    [ "$(cat "$_repo/.venv/deepep_moe.stamp" 2>/dev/null)" = "$stamp" ] && return

    if _sees_gpu "$base"; then
        _say "making .venv on top of $base, whose torch sees a GPU"
        "$base" -m venv --clear --without-pip "$_repo/.venv" || _stop "could not make .venv"
        # not --system-site-packages: that skips $base's own packages where $base is a virtual environment itself;
        # without pip, because the setuptools that may come with it is older than the one beneath
        "$base" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
            >"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/beneath.pth"
        torch_version=$("$PYTHON" -c 'import torch; print(torch.__version__)')
        # the locked packages, except that nothing may bring another torch
        if ! _pip install -q --no-build-isolation -r <(grep -v '^torch==' "$lock") -c <(echo "torch==$torch_version"); then
            _say "some packages could not be installed (no network?); going on with what $base has"
        fi
    else
        _say "making .venv with $base and the versions of requirements-dev.lock (some minutes, once)"
        "$base" -m venv "$_repo/.venv" || _stop "could not make .venv"
        _pip install -q "$(grep '^torch==' "$lock")" || _stop "could not install torch"
        _pip install -q $(grep -E '^(setuptools|wheel|packaging|numpy|ninja|pybind11)==' "$lock") || _stop "pip failed"
        _pip install -q --no-build-isolation -r "$lock" || _stop "could not install requirements-dev.lock"
    fi
    echo "$stamp" >"$_repo/.venv/deepep_moe.stamp"
}

# this checkout, editable: again when the build files changed; the extension whenever its sources did
_install_package() {
    local stamp_file="$_repo/build/installed.stamp" stamp log
    mkdir -p "$_repo/build"
    log="$_repo/build/install.log"
    stamp="$PYTHON $(cat "$_repo/setup.py" "$_repo/pyproject.toml" | sha256sum | cut -c1-16)"
    if ! (cd "$_repo" && "$PYTHON" setup.py build_ext --inplace) >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        _stop "building the CUDA extension failed (whole log: build/install.log); DEEPEP_MOE_CUDA=0 goes without it"
    fi
    if [ "$(cat "$stamp_file" 2>/dev/null)" != "$stamp" ] || ! _has_package; then
        sed -n '/^deepep_moe build:/,/^ *NVSHMEM/p' "$log" >&2
        if ! _pip install -q --no-deps --no-build-isolation -e "$_repo" >"$log" 2>&1; then
            tail -n 30 "$log" >&2
            _stop "installing this checkout failed (whole log: build/install.log)"
        fi
        _has_package || _stop "$PYTHON does not import deepep_moe from $_repo after the installation"
        echo "$stamp" >"$stamp_file"
    fi
}

_has_package() {
    (cd / && "$PYTHON" -c '
import os, sys, importlib.util
spec = importlib.util.find_spec("deepep_moe.integrations")
sys.exit(spec is None or not os.path.samefile(os.path.dirname(spec.origin), sys.argv[1]))' "$_repo/integrations") 2>/dev/null
}

if [ -n "${DEEPEP_MOE_PYTHON:-}" ]; then
    PYTHON=$("$DEEPEP_MOE_PYTHON" -c 'import sys; print(sys.executable)') ||
        _stop "DEEPEP_MOE_PYTHON=$DEEPEP_MOE_PYTHON is no Python that runs"
    "$PYTHON" -c 'import torch' || _stop "DEEPEP_MOE_PYTHON=$PYTHON cannot import torch"
else
    _make_venv
fi
_install_package
export PYTHON
