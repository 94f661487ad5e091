"""What is on the card and when: networks, their layers, and the room that stages need."""
