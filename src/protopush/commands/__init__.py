"""What the commands do, once their words are parsed: so that ``--help`` needn't wait for heavy imports."""
