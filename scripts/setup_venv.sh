#!/bin/sh
# setup_venv.sh PYTHON VENV STAMP [EXTRA ...]
# Makes VENV when it is missing or broken, installs the project there (editable, with the extras) and
# leaves STAMP, an empty file. Called by the Makefile when STAMP is older than pyproject.toml.
set -eu

die() {
  echo "error: $*" >&2
  exit 1
}

python=$1 venv=$2 stamp=$3
shift 3

requires=$(sed -n 's/^requires-python = "\(.*\)"$/\1/p' pyproject.toml)
oldest=$(echo "$requires" | sed -n 's/^>=3\.\([0-9]*\),<3\.[0-9]*$/\1/p')
newest=$(echo "$requires" | sed -n 's/^>=3\.[0-9]*,<3\.\([0-9]*\)$/\1/p')
[ -n "$oldest" ] && [ -n "$newest" ] || die "pyproject.toml: requires-python = \"$requires\", not of the form >=3.a,<3.b"
newest=$((newest - 1))
range="Python 3.$oldest to 3.$newest"

# The names of the extras, from pyproject.toml: pip itself only warns about one that does not exist.
known=$(sed -n '/^\[project\.optional-dependencies\]/,/^\[tool/s/^\([a-z0-9]*\) = .*/\1/p' pyproject.toml | tr '\n' ' ')
for extra in "$@"; do
  case " $known" in *" $extra "*) ;; *) die "EXTRA=$extra: no such extra, there are: $known" ;; esac
done

minor_of() { # prints the b of Python 3.b; nothing for any other Python
  "$1" -c 'import sys; print(sys.version_info[1] if sys.version_info[0] == 3 else "")' 2>/dev/null || true
}

in_range() {
  [ -n "$1" ] && [ "$1" -ge "$oldest" ] && [ "$1" -le "$newest" ]
}

advice() { # what to do without a Python in range: one that is installed under another name, or install one
  minor=$newest
  while [ "$minor" -ge "$oldest" ]; do
    if [ "$(minor_of "python3.$minor")" = "$minor" ]; then
      echo "there is a python3.$minor: make PYTHON=python3.$minor ..."
      return
    fi
    minor=$((minor - 1))
  done
  echo "install one (Debian, Ubuntu: apt install python3.$oldest python3.$oldest-venv; elsewhere pyenv) and name it: make PYTHON=python3.$oldest ..."
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    die "$venv is there and is no virtual environment: move it away, or name another: make VENV=..."
  fi
  command -v "$python" >/dev/null 2>&1 || die "no $python here, $range is needed: $(advice)"
  minor=$(minor_of "$python")
  in_range "$minor" || die "$python is $("$python" --version 2>&1 || true), $range is needed: $(advice)"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python has no venv module: install it (Debian, Ubuntu: apt install python3.$minor-venv)"
  echo "Making $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
elif ! in_range "$(minor_of "$venv/bin/python")"; then
  die "$venv has $("$venv/bin/python" --version), $range is needed: make clean, then $(advice)"
fi

# What was installed before is installed again with the rest: a new JAX needs the CUDA plug-in of its
# own version. No stamp stays behind while pip is at work, so an interrupted one starts over.
stamps=$stamp extras=$*
for old in "$venv"/.installed*; do
  [ -e "$old" ] || continue
  stamps="$stamps $old"
  extras="$extras $(basename "$old" | sed 's/^\.installed//; s/-/ /g')"
  rm -f "$old"
done
list=$(echo "$extras" | tr -s ' ' '\n' | sed '/^$/d' | sort -u | paste -sd, -)
"$venv/bin/python" -m pip install ${CI:+--quiet} --disable-pip-version-check -e ".${list:+[$list]}"
for each in $stamps; do touch "$each"; done
