
        wrk.method, wrk.headers = "POST", {["Host"] = "127.0.0.1:35807", ["Content-Type"] = "application/json", ["X-Backfeedr-Key"] = "bf_live_bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"}
        answers = {}
        local requests, threads, last = {}, {}, 0
        function setup(thread) table.insert(threads, thread) end
        function init()
            for body in io.lines("/work/main/backfeedr-benchmark-v37dv8ak/events.jsonl") do table.insert(requests, wrk.format(nil, nil, nil, body)) end
        end
        function request() last = last % #requests + 1; return requests[last] end
        function response(status) answers[status] = (answers[status] or 0) + 1 end
        function done(summary, latency)
            local errors = summary.errors
            print("answers", 0, errors.connect + errors.read + errors.write + errors.timeout)
            for _, thread in ipairs(threads) do
                for status, count in pairs(thread:get("answers")) do print("answers", status, count) end
            end
            print("load", summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
                  latency.max / 1e3)
        end
        