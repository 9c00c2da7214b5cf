"""`dpo-fast demo`: a language model is trained from nothing, then aligned with `FastDPOTrainer`, in minutes on a CPU.

corpus.py          the training text, and a tokenizer trained on it
language_model.py  step 1: plain next-token training
measure.py         what is claimed is measured: probabilities of answers, and parsed generations
story.py           the three steps, their numbers, and whether the claimed effects materialised
pages.py           the report's text and charts
"""
