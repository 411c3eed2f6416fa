# Makes and reuses the Python environments of this repository. Sourced by tests/run.sh and
# examples/quickstart.sh; the caller stands in the repository root.
#
#   prepare_environment DIR PYTHON EXTRA TORCH [PACKAGE...]
#     DIR      environment folder, e.g. .venv
#     PYTHON   interpreter that makes it
#     EXTRA    extra of setup.py: report | dev ("dev" becomes "test" on a CUDA build of torch)
#     TORCH    requirement, e.g. torch==2.13.0
#     PACKAGE  more requirements, asked for together with lclm
#   Afterwards $DIR/bin is first on PATH. A second call with the same inputs installs nothing.

say() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*"; }

# The first interpreter that answers and is 3.11 or newer.
find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return 0
    fi
  done
  echo "error: no Python >= 3.11 found (tried python3, python3.13, python3.12, python3.11);" \
       "install one, or put it first on PATH" >&2
  return 1
}

# A Python 3.12 from PATH, else from pyenv.
find_python312() {
  local candidate
  for candidate in python3.12 "$(command -v pyenv >/dev/null && pyenv root)"/versions/3.12*/bin/python3.12; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return 0
    fi
  done
  echo "error: no python3.12 on PATH and none in pyenv; install one (pyenv install 3.12)" >&2
  return 1
}

# Hash of everything that decides what an installation holds. $1: python, rest: words to mix in.
installation_hash() {
  "$1" - "${@:2}" <<'PYTHON'
import hashlib, pathlib, sys
digest = hashlib.sha256(repr((sys.version, sys.argv[1:])).encode())
for path in ["setup.py", "pyproject.toml", "CMakeLists.txt", *sorted(pathlib.Path("kernels/native").glob("*.*"))]:
    if pathlib.Path(path).suffix in {".py", ".toml", ".txt", ".cpp", ".h"}:
        digest.update(pathlib.Path(path).read_bytes())
for root in ("lclm", "kernels"):  # a new package must be mapped by the editable install
    digest.update(repr(sorted(str(p.parent) for p in pathlib.Path(root).rglob("__init__.py"))).encode())
print(digest.hexdigest())
PYTHON
}

prepare_environment() {
  local dir=$1 base=$2 extra=$3 torch=$4
  shift 4
  local wanted stamp installed_extra=$extra
  wanted=$(installation_hash "$base" "$PWD" "$torch" "$@")
  link_kernels
  for stamp in "$dir/.installed-$extra" "$dir/.installed-dev"; do  # "dev" holds all of "report"
    if [ -x "$dir/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
      export PATH="$PWD/$dir/bin:$PATH"
      return 0
    fi
  done
  say "installing into $dir (once; the next run reuses it)"
  [ -x "$dir/bin/python" ] || "$base" -m venv "$dir"
  local pip=("$dir/bin/python" -m pip --disable-pip-version-check) quiet=()
  [ -t 1 ] || quiet=(--quiet)  # progress bars on a terminal, plain lines in a log
  "${pip[@]}" install "${quiet[@]}" --upgrade pip
  # torch first and by exact version, before anything else can pull one in: where this machine
  # offers pip a CPU build of that version ("+cpu", for instance through PIP_FIND_LINKS) the exact
  # request takes it, since a local build counts as newer than the plain one; elsewhere (another
  # Python, an NVIDIA GPU) the ordinary resolver decides.
  say "pip install $torch"
  "${pip[@]}" install "${quiet[@]}" "$torch"
  if [ "$extra" = dev ] &&
     "$dir/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    installed_extra=test  # a CUDA build of torch brings its own Triton
  fi
  local tool_path=$PATH
  if ! command -v cmake >/dev/null && command -v c++ >/dev/null; then
    # only a build tool: without it the NumPy versions of the native functions run
    if "${pip[@]}" install "${quiet[@]}" cmake; then
      tool_path="$("$dir/bin/python" -c 'import cmake; print(cmake.CMAKE_BIN_DIR)'):$PATH"
    fi
  fi
  say "pip install -e .[$installed_extra] $*"
  PATH="$tool_path" "${pip[@]}" install "${quiet[@]}" -e ".[$installed_extra]" "$@"
  printf '%s\n' "$wanted" > "$dir/.installed-$extra"
  export PATH="$PWD/$dir/bin:$PATH"
}

# See [tool.mypy] in pyproject.toml.
link_kernels() {
  mkdir -p build/typing
  ln -sfn ../../kernels build/typing/lclm_kernels
}
