"""Images and objects: COCO JSON, shards, views, the order of training. Knows no teacher."""
