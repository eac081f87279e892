"""One file per source: a published data set or a folder layout, read as ``Example`` or ``Skip``.

A source is built as ``METHOD(settings)`` and offers ``language`` (how its texts are worded, see
``_language``), ``examples(split, limit, seed)``, which reads lazily, and ``fingerprint()``, which
says in the manifest what was read. The splits "train", "heldout" and "probe" never overlap. A
faulty record is a Skip with the cause, never another record in its place.
"""
