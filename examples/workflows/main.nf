// Scores of the variants of a VCF, in parts that a cluster can work on at once.
//
//     nextflow run main.nf --variants VARIANTS.vcf.gz --fasta GENOME.fa.gz --parts 8
//
// Other parameters: output (scores.tsv), model (gengram-mini), options (more of `gengram score`).

params.parts = 4
params.output = 'scores.tsv'
params.model = ''
params.options = ''

process PART {
    maxRetries 2
    errorStrategy 'retry'

    input:
    tuple val(part), path(variants), path(fasta)

    output:
    tuple val(part), path('part.tsv')

    script:
    def model = params.model ? "--model ${params.model}" : ''
    """
    gengram score ${variants} --fasta ${fasta} --output part.tsv --shard ${part}/${params.parts} --quiet \
        ${model} ${params.options}
    """
}

process JOIN {
    publishDir '.', mode: 'copy'

    input:
    path 'part??????.tsv'

    output:
    path params.output

    script:
    """
    awk 'FNR > 1 || NR == 1' part*.tsv > ${params.output}
    """
}

workflow {
    parts = Channel.of(1..params.parts)
        .map { part -> tuple(part, file(params.variants), file(params.fasta)) }
    PART(parts)
    JOIN(PART.out.toSortedList { a, b -> a[0] <=> b[0] }.map { rows -> rows.collect { row -> row[1] } })
}
