"""The language-model room. Read `load.py` (a frozen base), `adapters.py` (what is trained on it), `objectives.py`
(text to targets), then `bench.py` (losses for many silos at once).

Importing it sets the switches that Hugging Face libraries read once, when they are first imported: no telemetry, no
progress bars in our output, no thread pool in the tokenizer (it would deadlock forked workers). Switches that the user
has set already are left alone.
"""

import os

for _name, _value in {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}.items():
    os.environ.setdefault(_name, _value)
