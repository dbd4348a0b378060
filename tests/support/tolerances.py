"""How far apart two numbers of a test may be: one row for each kind of comparison, and its reason.

Rows are absolute unless their name or reason says otherwise. What must be equal bit for bit has no row.
"""

# Our logits and the authors' recorded ones. 1.2e-5 to 7.2e-5 were measured; the router's margins in the recorded cases
# are at least 8e-5, so that no expert can flip.
LOGITS_FP32 = 1e-4

# The same in float64, where RoPE angles and the router's softmax stay float32 on both sides. Without these two casts a
# prototype agreed to 4e-14.
LOGITS_FP64 = 1e-4

# Logits of a converted model and of the brute force, float64 but for RoPE angles and the router's softmax: 1.3e-14 was
# measured over 42 seeds, with room for a softmax of float32 whose last bit differs between machines.
BRUTE_FORCE_LOGITS_FP64 = 1e-6

# The memory and its window sums in float64, beside the authors' module and the brute force: 9e-16 was measured.
MEMORY_FP64 = 1e-12

# The memory in float32 beside the authors' module in float64: 5e-7 was measured.
MEMORY_FP32 = 1e-5

# Relative and absolute: the memory of any sizes and tables of unit weights beside the brute force, in float64. Weights
# are not scaled, so that values are larger than in the recorded cases.
RANDOM_MEMORY_FP64 = 1e-11

# Relative and absolute: gradients of the same. They pass through the square root of the gate, which is steep near 0.
RANDOM_MEMORY_GRADIENT_FP64 = 1e-8

# Folded tables beside the definition in float64: sums of projected rows instead of projections of sums.
FOLDED_FP64 = 1e-11

# Shares of k-mers in float64 beside brute force, and their sum beside the whole, relative to the larger of the whole
# and the largest share: 1e-15 was measured.
SHARES_FP64 = 1e-10

# Relative, of norms, or of a loss: a small model in 16 bits beside float32. Ten layers' roundings, and now and then a
# router that chooses another expert at a tie.
MODEL_BF16 = 0.5
MODEL_FP16 = 0.0625
DENSE_MODEL_BF16 = 0.125  # without a router: 0.061 was measured
MODEL_LOSS_BF16 = 0.05

# Share of the largest value: table-major values and gradients beside the definition in float64. The gate's square root
# is steep near 0.
TABLE_MAJOR_FP64 = 1e-10

# Derivatives beside finite differences in float64, as `torch.autograd.gradcheck` has them: steps of 1e-6.
FINITE_DIFFERENCES = 1e-5
FINITE_DIFFERENCES_RELATIVE = 1e-4

# Gradients summed along a path at 64 or 128 nodes of Gauss and Legendre, beside the difference of its ends: float64, a
# gate without a jump. 3e-9 was measured without a memory.
PATH_INTEGRAL = 1e-6

# Means of 21 rows of unit weights in float32 beside float64: some units in the last place (1.2e-7 at 1).
WINDOW_MEAN_FP32 = 2e-6

# Relative, of norms: `as_trained` beside the authors' bfloat16. bfloat16 rounds to 2^-9 = 0.2 % per operation, and
# about ten follow one another.
AS_TRAINED_BF16 = 1e-2

# Relative, of norms: native kernels in float32 beside the definition in float64. A result adds up some 17 rows, a norm
# over the hidden size and the taps; each rounding is 6e-8.
KERNELS_FP32 = 1e-5

# Relative, of norms: gradients in float32 beside those of float64. They are sums over all places of a row.
GRADIENTS_FP32 = 1e-4

# What is 0 in the definition may be this much elsewhere: a relative error of 0 would allow nothing.
ZERO_NORM = 1e-12

# Relative, then absolute: gradients of a whole model through two ways of the memory, both in float32.
MODEL_GRADIENTS_FP32_RELATIVE = 1e-4
MODEL_GRADIENTS_FP32 = 1e-6

# Absolute, beside the relative row above: gradients of a whole model on a GPU and on a CPU, float32 on both.
MODEL_GRADIENTS_OTHER_DEVICE_FP32 = 1e-5

# Outputs and probabilities in float32 that differ in the order of additions only: other batches, pieces, padding,
# caches, ways of the memory, kernels for experts. They are of the order of 1, where one rounding is 1.2e-7.
SAME_FP32 = 1e-5

# The same for hidden states of any layer, pooled: before the last norm they may be some times larger than 1.
SAME_HIDDEN_STATES_FP32 = 2e-5

# The same for models whose weights were rounded otherwise, too: adapters merged into weights (W + BA), training steps
# computed in another order, weights read as float64, outputs scaled to the targets' unit.
SAME_MODEL_FP32 = 1e-4

# Relative, then absolute: the router's losses beside their formulas in float64.
ROUTER_LOSSES_FP32_RELATIVE = 1e-5
ROUTER_LOSSES_FP32 = 1e-6

# Log-probability of one base in float32 beside float64, in nats or bits.
LOG_PROBABILITY_FP32 = 1e-6

# Sums of log-probabilities over a sequence, from logits that are apart by SAME_FP32.
LOG_LIKELIHOOD_FP32 = 1e-4
LOG_LIKELIHOOD_BF16 = 0.5

# Probabilities of bases at a gap in float32 beside the brute force in float64.
POSTERIOR = 1e-5

# Bits per base of a data set, by `Trainer` and by `gengram bench`, each in its own batches.
BITS_PER_BASE_FP32 = 1e-4

# Logarithms of shares of counts in float64, beside shares counted one by one.
MARKOV_BITS = 1e-9

# Relative: means of a few float32 numbers.
FLOAT32_RELATIVE = 1e-6

# Relative: means of a few float64 numbers, of rows one by one and together.
FLOAT64_RELATIVE = 1e-12

# Relative: rotary frequencies in float32 beside Python's numbers: a power and some products.
ROPE_FREQUENCIES_FP32_RELATIVE = 1e-5

# Shares of 10,000 evenly spaced draws beside probabilities: one draw on either side of a boundary.
SAMPLED_SHARE = 2e-4

# Share of an interval's half width: 4,000 bootstrap samples of 400 values beside the standard error.
BOOTSTRAP_INTERVAL = 0.1

# Nats: the loss of a model that has learned nothing beside that of even chances. Random logits cost a little more.
UNTRAINED_LOSS = 0.3

# At least so far apart, somewhere: what must differ because a weight, or the text that the memory reads, has changed.
# Far above SAME_FP32, so that rounding is no change.
CHANGED = 1e-4
CHANGED_LOGITS = 1e-3

# Relative: probabilities in float64 that were divided by their sum.
PROBABILITIES_SUM_TO_ONE = 1e-12

# The mean of 1,000 even draws from 0..1 has a standard deviation of 0.009.
MEAN_OF_EVEN_DRAWS = 0.05

# Relative, of norms: products with quantised experts beside those with the weights that they stand for. float32 sums
# over at most some hundred columns, each rounded by 6e-8; bfloat16 rounds weights and results to 2^-9 = 0.2 %.
QUANTIZED_PRODUCT = 1e-5
QUANTIZED_PRODUCT_BF16 = 1e-2
# The difference of two means that are each written with four digits behind the point, and itself rounded so.
ROUNDED_MEANS = 2e-4
