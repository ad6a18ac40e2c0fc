"""Videos to tiles: `container` looks at the file, `pyav` or `decord` decodes the frames, `preparation` cuts them."""
