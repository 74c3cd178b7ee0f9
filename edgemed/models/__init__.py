"""The torch modules: the single definition that training uses and that export wraps. Needs torch; never imported at run time."""
