#!/bin/sh
# same_python.sh PYTHON VENV
# Fails when VENV exists with another version of Python than the PYTHON that was asked for.
python=$1 venv=$2

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

there=$(version "$venv/bin/python") || exit 0
asked=$(version "$python") || exit 0
[ "$there" = "$asked" ] && exit 0
echo "error: $venv has Python $there, PYTHON=$python is $asked: make clean first, or name another environment: VENV=.venv$asked" >&2
exit 1
