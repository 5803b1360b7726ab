# shellcheck shell=bash
# Source this from anywhere: it makes the development environment if needed, installs this checkout into it (editable)
# and sets
#
#   PYTHON   the interpreter to use
#
# First time: minutes, and a network to a Python package index. After that: a second or two.
#
#   DEEPEP_MOE_PYTHON=/path/to/python  use this interpreter and its packages; only this checkout is installed into it
#   DEEPEP_MOE_PACKAGES=recipes        install only what recipes/train_megatron.py needs; default: all of the lock file
#   DEEPEP_MOE_CUDA=0|1                skip | require the CUDA extension; default: compile it where there is a GPU and
#                                      nvcc, or where this checkout has one already
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

# pip install, whose progress is shown. Byte code is written when a module is first imported.
_install() { _pip install --no-compile "$@" >&2 || _stop "could not install the packages"; }

# Requirements of recipes/train_megatron.py, and of the build of this checkout, one a line.
_recipe_requirements() {
    "$PYTHON" - "$_repo/pyproject.toml" <<'END'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    settings = tomllib.load(file)
project = settings["project"]
extra = project["optional-dependencies"]["recipes"]
print(*settings["build-system"]["requires"], *project["dependencies"], *extra, "wheel", sep="\n")
END
}

# .venv with the locked versions; its own torch, or the torch of the Python beneath it
_make_venv() {
    local lock="$_repo/requirements-dev.lock" packages="${DEEPEP_MOE_PACKAGES:-all}" base had stamp torch_version wanted
    case $packages in all | recipes) ;; *) _stop "DEEPEP_MOE_PACKAGES=$packages: use all or recipes" ;; esac
    if _sees_gpu python3; then base=$(command -v python3); else base=$(_base_python) || exit 1; fi
    PYTHON="$_repo/.venv/bin/python"
    stamp="$(sha256sum <"$lock" | cut -c1-16) $base"
    had=$(cat "$_repo/.venv/deepep_moe.stamp" 2>/dev/null || true)
    if [ "$had" = "$stamp" ] || [ "$had $packages" = "$stamp recipes recipes" ]; then return; fi

    case "$had " in
    *" $base "*) _say "bringing .venv up to date" ;;
    *) # --clear: what another Python left there would be found first
        _say "making .venv with $base"
        if _sees_gpu "$base"; then
            "$base" -m venv --clear --without-pip "$_repo/.venv" || _stop "could not make .venv"
            # not --system-site-packages: that skips $base's own packages where $base is a virtual environment itself;
            # without pip, because the setuptools that may come with it is older than the one beneath
            "$base" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
                >"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/beneath.pth"
        else
            "$base" -m venv --clear "$_repo/.venv" || _stop "could not make .venv"
        fi
        ;;
    esac
    if [ "$packages" = all ]; then wanted=$(cat "$lock"); else wanted=$(_recipe_requirements) || _stop "pyproject.toml"; fi

    if _sees_gpu "$base"; then
        _say "its torch sees a GPU: installing the other packages on top of it"
        torch_version=$("$PYTHON" -c 'import torch; print(torch.__version__)')
        # the locked versions, except that nothing may bring another torch
        if ! _pip install --no-build-isolation -r <(grep -v '^torch' <<<"$wanted") \
            -c <(grep -v '^torch==' "$lock") -c <(echo "torch==$torch_version") >&2; then
            _say "some packages could not be installed (no network?); going on with what $base has"
        fi
    else
        if [ "$packages" = all ]; then # what others are built with goes in before them
            _say "installing torch and build tools (1 of 2)"
            _install -c "$lock" $(grep -E '^(torch|setuptools|wheel|packaging|numpy|ninja|pybind11)==' "$lock")
            _say "installing the other packages (2 of 2)"
        else
            _say "installing torch and what the recipes need"
        fi
        _install --no-build-isolation -c "$lock" -r <(echo "$wanted")
    fi
    [ "$packages" = all ] || stamp="$stamp recipes"
    echo "$stamp" >"$_repo/.venv/deepep_moe.stamp"
}

# DEEPEP_MOE_CUDA for the build of this checkout. Compiling takes minutes and is of no use to a machine without a GPU.
_cuda_choice() {
    if [ -n "${DEEPEP_MOE_CUDA:-}" ]; then
        echo "$DEEPEP_MOE_CUDA"
    elif ! nvidia-smi -L 2>/dev/null | grep -q '^GPU' && ! compgen -G "$_repo/deepep_moe/_*.so" >/dev/null; then
        echo 0
    fi
}

# this checkout, editable: again when the build files changed; the extension whenever its sources did
_install_package() {
    local stamp_file="$_repo/build/installed.stamp" log="$_repo/build/install.log" cuda stamp
    mkdir -p "$_repo/build"
    cuda=$(_cuda_choice)
    stamp="$PYTHON $(cat "$_repo/setup.py" "$_repo/pyproject.toml" | sha256sum | cut -c1-16)"
    if ! (
        set -o pipefail
        (cd "$_repo" && DEEPEP_MOE_CUDA=$cuda "$PYTHON" setup.py build_ext --inplace) 2>&1 | tee "$log" |
            sed -un "s#.* -c $_repo/\([^ ]*\) .*#set-up: compiling \1#p" >&2
    ); then
        tail -n 30 "$log" >&2
        _stop "building the CUDA extension failed (whole log: build/install.log); DEEPEP_MOE_CUDA=0 goes without it"
    fi
    if [ "$(cat "$stamp_file" 2>/dev/null)" != "$stamp" ] || ! _has_package; then
        if [ -z "${DEEPEP_MOE_CUDA:-}" ] && [ "$cuda" = 0 ]; then
            _say "no GPU here: kernels are not compiled (DEEPEP_MOE_CUDA=1 compiles them)"
        else
            sed -n '/^deepep_moe build:/,/^ *NVSHMEM/p' "$log" >&2
        fi
        _say "installing this checkout"
        if ! DEEPEP_MOE_CUDA=$cuda _pip install -q --no-deps --no-build-isolation -e "$_repo" >"$log" 2>&1; then
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
