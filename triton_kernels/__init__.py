"""Operations of box-token decoding and of experts, one a file: meaning, reference, kernel, launcher. Loads no library.

box_head, masked_argmax, accept_draft, expert_gemv    the operations
row_tiles, weights                                    what they share: rows of the LM head, formats of a matrix
head_file                                             the LM head beside the cubins of a bundle
variants                                              what is compiled, and what a launcher can do
aot                                                   compiles ahead of time (build: triton)
triton_launcher                                       runs through Triton or its interpreter (tests: triton, torch)
launch                                                runs what was compiled (workstation: cuda-core)
"""
