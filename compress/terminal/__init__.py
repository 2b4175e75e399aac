"""What a terminal shows and takes: progress, tables, options, commands."""
