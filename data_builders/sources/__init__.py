"""One file per source: a published data set or a folder layout, read as ``Example`` or ``Skip``.

A source is built as ``METHOD(settings)`` and offers ``language`` (how its texts are worded, see
``_language``), ``examples(split, limit, seed, start=0)``, which reads lazily and begins with record
``start`` without opening those before it, and ``fingerprint()``, which says in the manifest what
was read. The splits "train", "heldout" and "probe" never overlap. A faulty record is a Skip with
the cause, never another record in its place.

A source of pairs, which reads a released preference set, offers ``pairs(limit, seed)`` in place of
``examples``: pairs and skips of the first ``limit`` rows in the release's own order, streamed; and
``expected``, the reasons for a skip that the release or a setting brings and that are no fault
(``data_builders.released`` makes an arm of it). It reads a Hub id, a file or a folder.
"""
