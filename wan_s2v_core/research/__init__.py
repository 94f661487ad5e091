"""What is not on the way from a voice to a video; nothing outside imports it. `python -m wan_s2v_core.research`."""
