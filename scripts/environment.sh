# Sourced by quickstart.sh and test.sh, from the checkout's top: `source scripts/environment.sh REQUIREMENTS`.
# Makes .venv where it is missing, installs the file into it once (again when the file changes), and activates it.
if [[ ! -f .venv/bin/activate ]]; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: Python 3.10 or newer is needed, python3 is $(python3 --version 2>&1)" >&2
    exit 2
  }
  echo "Making .venv" >&2
  python3 -m venv --clear .venv
fi
source .venv/bin/activate
wanted=$(cat requirements*.txt | sha256sum)
if [[ $(cat ".venv/$1.installed" 2>/dev/null) != "$wanted" ]]; then
  echo "Installing $1 (some minutes)" >&2
  python -m pip install --quiet --disable-pip-version-check -r "$1"
  echo "$wanted" >".venv/$1.installed"
fi
