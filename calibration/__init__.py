"""Calibration and evaluation text that ships with nvquant, and specs of Hub data sets; holds no code of the library.

`offline.jsonl.xz` is a calibration set that may be redistributed, `heldout.jsonl.xz` a set of the same mix from other
works and chapters, for evaluation only. A line is one document: `{"kind", "source", "language", "text"}` or, for a
dialogue, `{"kind", "source", "language", "messages"}`. `ORIGINS.md` names the work, the holder and the licence behind
every source, `LICENSES/` holds the notices that travel with the text. The YAML files name the places of calibration
data, in these files or on the Hugging Face Hub, and the shares of its kinds: `technical`, `prose`, `code`, `dialogue`,
`language` and `mathematics`. `build.py` makes the text again.
"""
