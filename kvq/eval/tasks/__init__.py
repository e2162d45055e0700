"""Task files, data only: lm-eval's own tasks on rows of a local folder (``kvq.eval.local``)."""
