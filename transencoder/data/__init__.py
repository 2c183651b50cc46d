"""Files and Hub sets -> checked rows -> tokens."""
