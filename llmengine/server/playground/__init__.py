"""The playground at `/`: one static page, and the feed of its live view of the batch.

The page has no build step, loads nothing from elsewhere, and uses the same endpoints as other clients.
"""
