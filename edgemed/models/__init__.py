"""The torch modules: the one definition that training uses and that export wraps. Never imported at run time."""
