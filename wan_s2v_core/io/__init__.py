"""Files in and out: weights now, video and audio with the pipeline."""
