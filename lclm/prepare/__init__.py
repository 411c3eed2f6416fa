"""Text to indexed files; training imports nothing of it.

One document, with a tokenizer of single bytes (a tiktoken file):

>>> import base64, tempfile
>>> from pathlib import Path
>>> from lclm.data.indexed import IndexedReader
>>> from lclm.data.tokenizer import load_tokenizer
>>> from lclm.prepare.encoder import EncodeOptions, encode_sources
>>> from lclm.prepare.readers import find_sources
>>> folder = tempfile.TemporaryDirectory()
>>> text, ranks = Path(folder.name, "a.jsonl"), Path(folder.name, "tokenizer.model")
>>> _ = text.write_text('{"text": "a cat"}')
>>> _ = ranks.write_text("".join(f"{base64.b64encode(bytes([n])).decode()} {n}\\n"
...                              for n in range(256)))
>>> tokenizer, prefix = load_tokenizer(ranks), f"{folder.name}/a"
>>> options = EncodeOptions(append_eod=True)
>>> summary = encode_sources(find_sources([text]), tokenizer, prefix, options)
>>> IndexedReader(prefix).read(0).tolist(), tokenizer.eod_id
([97, 32, 99, 97, 116, 257], 257)
>>> folder.cleanup()
"""
