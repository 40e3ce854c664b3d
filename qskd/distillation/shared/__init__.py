"""What several methods need: asking both networks the same queries (`asked`), comparing classes (`classes`), columns of the cache
that keep some of the queries (`kept`), maps that meet (`maps`), weights that rise and fall (`ramp`), and that do not on images
without labels (`unfaded`)."""
