"""The label-efficiency study: does pre-training help on this data set, with this many labels?

`split` assigns cases to test, validation and training. `study` lists the cells, `steps` schedules them, and `cell` runs one.
`results`, `statistics`, `report` and `figure` evaluate them. `run.compare` runs a whole study.
"""
