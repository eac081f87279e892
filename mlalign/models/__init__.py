"""Model families: one file each says how to load, adapt and lay out that family."""

NOT_METHODS = ("loading",)
