"""Operations of box-token decoding, one a file: the meaning as pseudo-code and the reference. Imports nothing here."""
