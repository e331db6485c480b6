# `make demo` and `make test` do their own set-up: they need Python 3.11+ and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin

export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test memory-test notebook notebook-test mutants faults lint audit browser-test

# On Linux pip's torch is CUDA's, gigabytes that a machine without an NVIDIA driver cannot use: there it is the CPU build,
# unless its index cannot be reached.
CPU_WHEELS := https://download.pytorch.org/whl/cpu
.venv/.installed: requirements.txt
	@echo "installing the packages into .venv, once; some minutes"
	$(PYTHON) -m venv .venv
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi > /dev/null && \
		curl --silent --fail --head --max-time 5 --output /dev/null $(CPU_WHEELS)/torch/; then \
		echo "no NVIDIA driver: the CPU build of torch"; \
		$(BIN)/python -m pip install "$$(grep ^torch== requirements.txt)" --index-url $(CPU_WHEELS); fi
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

test: .venv/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Memory as computed by benchmarks/memory.py against what runs take: the cases that `make test` leaves out.
memory-test: .venv/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_memory.py

# Runs recipes/learn_ppo.ipynb, without Jupyter, and writes into it what its cells show; a few minutes.
notebook: .venv/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/notebook_cells.py recipes/learn_ppo.ipynb

# The same into a folder of its own, and holds what it shows to what it says.
notebook-test: .venv/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_notebook.py

# Breaks one line of the PPO code at a time and says whether a test fails; about half an hour.
mutants: .venv/.installed
	$(BIN)/python tests/mutants.py

# Breaks runs in 14 ways at 20 moments each and resumes them; two hours at most. Without root, only ten of the 14.
faults: .venv/.installed
	$(BIN)/python benchmarks/faults.py

# The report in a real browser; Debian's is installed where there is none.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
browser-test: .venv/.installed
	test -x /usr/bin/chromium && test -x /usr/bin/chromedriver || { $(SUDO) apt-get update && \
		$(SUDO) apt-get install --yes --no-install-recommends chromium chromium-driver; }
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 REQUIRE_BROWSER=1 $(BIN)/python -m pytest tests/test_browser.py

# Known vulnerabilities of what is installed; asks the Python Package Index.
audit: .venv/.installed
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && \
		.venv-audit/bin/python -m pip install --quiet pip-audit==2.10.1; }
	PIPAPI_PYTHON_LOCATION=$(BIN)/python .venv-audit/bin/pip-audit

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The threads that accelerate takes by itself, given so that it need not say so.
THREADS = $(shell $(BIN)/python -c "import psutil; print(psutil.cpu_count(logical=False) or 1)")
LAUNCH = $(BIN)/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml \
	--num_cpu_threads_per_process $(THREADS)

# Data, language model, reward model, PPO and report of the toy reviews; offline once installed. The seconds are those of
# an idle 2-core Intel Xeon (README.md, recipes/README.md).
demo: export HF_HUB_OFFLINE = 1
demo: export PYTHONWARNINGS = ignore::FutureWarning
demo: .venv/.installed
	@echo "1 of 5: toy reviews, a few seconds; next a language model of them"
	$(BIN)/python data_prep/toy_reviews.py
	@echo "2 of 5: language model, about 80 s; next a reward model"
	$(LAUNCH) recipes/sentiment_gpt2_sft.py --config tiny --overwrite_output_dir true
	@echo "3 of 5: reward model, about 36 s; next PPO, which starts from both"
	$(LAUNCH) recipes/sentiment_gpt2_reward.py --config tiny --overwrite_output_dir true
	@echo "4 of 5: PPO, about 30 s; next a report of what it changed"
	$(LAUNCH) recipes/sentiment_gpt2_ppo.py --config tiny --overwrite_output_dir true
	@echo "5 of 5: report, about 15 s; then open runs/tiny/report/report.html"
	$(BIN)/python -m eval.compare --base runs/tiny/sft --tuned runs/tiny/ppo --prompts data/toy_reviews/prompts \
		--reward reward_model=runs/tiny/reward --judge lexicon=data_prep.toy_reviews:lexicon_score \
		--best_of 1 2 4 8 16 --output runs/tiny/report --overwrite
