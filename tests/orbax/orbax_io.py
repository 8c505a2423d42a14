"""Saving and loading with the real Orbax, through all of its public doors."""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as v0
from orbax.checkpoint import v1

from trees import flatten, kind, rebuild


class Saved:
    """A checkpoint on disk and what went into it.

    `path`, `item` and `arguments` are what a reader is told; `folder` and `door` are what Orbax needs.
    """

    def __init__(self, path, tree, door, folder=None, item=None, arguments=(), notes=''):
        self.path, self.tree, self.door = path, tree, door
        self.folder = folder or path
        self.item, self.arguments, self.notes = item, list(arguments), notes


def save(rng, api, tree, path):
    """Saves `tree` at `path` with random storage options and layout."""
    return {'v1': save_v1, 'v0-pytree': save_v0_pytree, 'v0-standard': save_v0_standard,
            'v0-manager': save_v0_manager}[api](rng, tree, pathlib.Path(path))


def save_v1(rng, tree, path):
    context = v1.Context()
    saving = context.array.saving
    saving.use_ocdbt = bool(rng.random() < 0.7) or has_backslash(tree)
    saving.use_zarr3 = bool(rng.random() < 0.7)
    saving.use_compression = bool(rng.random() < 0.6)
    if rng.random() < 0.3:
        saving.storage_options.chunk_byte_size = int(rng.choice([16, 64, 200]))
    if saving.use_ocdbt and rng.random() < 0.3:
        saving.ocdbt_target_data_file_size = int(rng.choice([512, 2048]))
    if rng.random() < 0.2:
        saving.use_replica_parallel = False
    notes = (f'v1 ocdbt={saving.use_ocdbt} zarr3={saving.use_zarr3} compression={saving.use_compression} '
             f'chunk_byte_size={saving.storage_options.chunk_byte_size} '
             f'file_size={saving.ocdbt_target_data_file_size}')
    with context:
        if rng.random() < 0.75:
            v1.save(path, tree)
            return Saved(path, tree, 'v1', item='state', notes=notes)
        item = str(rng.choice(['params', 'model', 'ema']))
        v1.save_checkpointables(path, {item: tree, 'extra': {'n': np.arange(3)}})
        return Saved(path, tree, 'v1', item=item, arguments=['--item', item], notes=notes + f' item={item}')


def save_v0_pytree(rng, tree, path):
    ocdbt, zarr3 = bool(rng.random() < 0.6) or has_backslash(tree), bool(rng.random() < 0.4)
    chunk = int(rng.choice([16, 64, 200])) if rng.random() < 0.3 else None
    saver = v0.PyTreeCheckpointer(use_ocdbt=ocdbt, use_zarr3=zarr3)
    arguments = rebuild(tree, lambda path, leaf: v0.SaveArgs(chunk_byte_size=chunk))
    file_size = int(rng.choice([512, 2048])) if ocdbt and rng.random() < 0.3 else None
    saver.save(path, args=v0.args.PyTreeSave(tree, save_args=arguments, ocdbt_target_data_file_size=file_size))
    saver.close()
    return Saved(path, tree, 'v0', notes=f'v0 pytree ocdbt={ocdbt} zarr3={zarr3} chunk_byte_size={chunk} '
                                         f'file_size={file_size}')


def has_backslash(tree):
    """Without OCDBT such a name is written with a slash, and Orbax cannot find it again."""
    return any('\\' in str(element) for path, _ in flatten(tree) for element in path)


def save_v0_standard(rng, tree, path):
    # Standard saves turn numpy scalars into 0-d arrays.
    tree = jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf, tree)
    saver = v0.StandardCheckpointer()
    saver.save(path, tree)
    saver.close()
    return Saved(path, tree, 'v0', notes='v0 standard')


def save_v0_manager(rng, tree, path):
    """Two steps; the tree under test is the later one or is asked for by number."""
    prefix = [None, 'ckpt'][int(rng.integers(0, 2))]
    width = [None, 5][int(rng.integers(0, 2))]
    options = v0.CheckpointManagerOptions(step_prefix=prefix, step_format_fixed_length=width,
                                          enable_async_checkpointing=False)
    other = {'other': np.arange(4)}
    early = bool(rng.random() < 0.4)
    with v0.CheckpointManager(path, options=options) as manager:
        for step in (9, 10):
            content = tree if (step == 9) == early else other
            manager.save(step, args=v0.args.PyTreeSave(content))
        manager.wait_until_finished()
    step = 9 if early else 10
    number = f'{step:05d}' if width else str(step)
    folder = path / (f'{prefix}_{number}' if prefix else number) / 'default'
    arguments = ['--step', str(step)] if early else [[], ['--step', 'latest'], ['--step', '10']][int(rng.integers(0, 3))]
    return Saved(path, tree, 'v0', folder=folder, item='default', arguments=arguments,
                 notes=f'v0 manager prefix={prefix} width={width} step={step}')


def load(saved, wanted):
    """Orbax's load. `wanted`: {path: (shape, dtype name, sharding) or None for a leaf to leave out}.

    Returns {path: jax.Array} for the wanted arrays.
    """
    if saved.door == 'v1':
        tree = load_v1(saved, wanted)
    else:
        tree = load_v0(saved, wanted)
    return {path: leaf for path, leaf in flatten(tree) if wanted.get(path) is not None}


def load_v1(saved, wanted):
    def abstract(path, leaf):
        if path in wanted:
            if wanted[path] is None:
                return v1.PLACEHOLDER
            shape, dtype, sharding = wanted[path]
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return leaf if kind(leaf) in ('none', 'empty') else v1.PLACEHOLDER

    context = v1.Context()
    context.array.loading.enable_padding_and_truncation = True
    with context:
        return v1.load(saved.folder, rebuild(saved.tree, abstract), checkpointable_name=saved.item)


def load_v0(saved, wanted):
    def abstract(path, leaf):
        if wanted.get(path) is None:
            return leaf if kind(leaf) in ('none', 'empty') else v0.PLACEHOLDER
        shape, dtype, sharding = wanted[path]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def arguments(path, leaf):
        if wanted.get(path) is None:
            return v0.RestoreArgs()
        shape, dtype, sharding = wanted[path]
        return v0.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=dtype, strict=False)

    loader = v0.PyTreeCheckpointer()
    tree = loader.restore(saved.folder, args=v0.args.PyTreeRestore(
        item=rebuild(saved.tree, abstract), restore_args=rebuild(saved.tree, arguments)))
    loader.close()
    return tree
