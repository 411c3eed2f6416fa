"""From text to rows: readers, tokenizer, indexed files, rows, mixture, loader, labels."""
