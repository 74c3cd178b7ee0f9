"""Writes the graphs of a bundle: trained weights to ONNX, and the comparison of the two. Imports nothing here."""
