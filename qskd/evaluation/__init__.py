"""From detections to AP, and how alike student and teacher are."""
