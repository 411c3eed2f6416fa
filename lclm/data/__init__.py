"""Indexed files to the rows of a stage: everything that the trainer reads.

Five documents in two domains, rows of eight tokens, three quarters of them from code:

>>> import tempfile
>>> from lclm.config import MixtureEntry
>>> from lclm.context.plan import plan_row
>>> from lclm.data.indexed import IndexedWriter
>>> from lclm.data.labels import build_labels
>>> from lclm.data.stage_rows import StageRows
>>> folder = tempfile.TemporaryDirectory()
>>> domains = {"code": [[11, 12, 13, 14, 15], [21, 22, 23], [31, 32, 33, 34, 35, 36, 37, 38]],
...            "books": [[51, 52, 53, 54, 55, 56], [61, 62]]}
>>> for name, documents in domains.items():
...     with IndexedWriter(f"{folder.name}/{name}", vocab_size=100) as writer:
...         for document in documents:
...             writer.add_document(document)

*Packing* decides which pieces of which documents make a row, the *mixture* whose turn it is:

>>> mixture = [MixtureEntry(prefix=f"{folder.name}/{name}", packing="concat", share=share)
...            for name, share in (("code", 0.75), ("books", 0.25))]
>>> stage = StageRows(mixture, seq_length=8, num_rows=4, seed=1, max_epochs=4)
>>> for number in range(len(stage)):
...     row = stage.row(number)
...     print(row.domain, row.tokens.tolist(), row.doc_lengths.tolist())
code [21, 22, 23, 31, 32, 33, 34, 35] [3, 5]
code [36, 37, 38, 11, 12, 13, 14, 15] [3, 5]
books [51, 52, 53, 54, 55, 56, 61, 62] [6, 2]
code [31, 32, 33, 34, 35, 36, 37, 38] [8]

Row 1 begins with what row 0 left of a document, and the last row starts a second epoch.
*Labels* are made on the whole row: the next token, none across the end of a document.

>>> row = stage.row(0)
>>> labels = build_labels(row.tokens, row.doc_lengths)
>>> labels.tolist()
[22, 23, -100, 32, 33, 34, 35, -100]

Then the row is cut for its context ranks: equally many tokens, nearly equal attention, each rank's
tokens in the order of the row. Rank 1 holds the short document whole and one token of the long one.

>>> plan = plan_row(row.attention_lengths, cp_size=2, chunk=1)
>>> for rank in range(2):
...     positions = plan.positions(rank)
...     print(rank, row.tokens[positions].tolist(), labels[positions].tolist())
0 [31, 33, 34, 35] [32, 34, 35, -100]
1 [21, 22, 23, 32] [22, 23, -100, 33]
>>> folder.cleanup()
"""
