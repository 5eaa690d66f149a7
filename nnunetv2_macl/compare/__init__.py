"""The label-efficiency study: does pre-training help on this data set, with this many labels?

`split` decides which cases are used for what, `study` which cells there are, `steps` who runs them when, `cell` runs one, and
`results`, `statistics`, `report` and `figure` say what came out. `run.compare` is the whole.
"""
