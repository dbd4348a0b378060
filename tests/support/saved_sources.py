"""Names of the source files that saved folders carry: a published format, so a change here is a change for users."""

SAVED_SOURCES = {
    "configuration_gengram.py",
    "configuration_motif_memory.py",
    "modeling_gengram.py",
    "motif_memory_as_trained.py",
    "motif_memory_definition.py",
    "motif_memory_module.py",
    "motif_memory_plan.py",
    "motif_memory_state.py",
    "motif_memory_ways_choose.py",
    "motif_memory_ways_compute.py",
    "motif_memory_ways_folded.py",
    "motif_memory_ways_gradients.py",
    "motif_memory_ways_irregular.py",
    "motif_memory_ways_kept_fold.py",
    "motif_memory_ways_native.py",
    "motif_memory_ways_one_token.py",
    "motif_memory_ways_operators.py",
    "motif_memory_ways_packed_tables.py",
    "motif_memory_ways_table_major.py",
    "motif_memory_ways_weights.py",
}
