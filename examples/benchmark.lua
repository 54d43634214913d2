-- The script that benchmark.py gives to wrk: posts the lines of a file in turn, and prints one line of JSON.
answers = {created = 0, others = 0}
local bodies, threads, last = {}, {}, 0

function setup(thread) table.insert(threads, thread) end

function init(arguments)
    for body in io.lines(arguments[1]) do table.insert(bodies, wrk.format("POST", nil, nil, body)) end
end

function request()
    last = last % #bodies + 1
    return bodies[last]
end

function response(status)
    local kind = status == 201 and "created" or "others"
    answers[kind] = answers[kind] + 1
end

function done(summary, latency)
    local socket, all = summary.errors, threads[1]:get("answers")
    print(string.format(
        '{"created": %d, "errors": %d, "seconds": %f, "p50": %f, "p99": %f, "longest": %f}', all.created,
        all.others + socket.connect + socket.read + socket.write + socket.timeout, summary.duration / 1e6,
        latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
