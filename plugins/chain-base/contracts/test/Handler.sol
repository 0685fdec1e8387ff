// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {Base} from "./Base.sol";
import {FeeToken, ReentrantToken, StubbornClient, TestArbiter, TestVerifier} from "./Parties.sol";
import {JobLane} from "../src/JobLane.sol";
import {SessionLane} from "../src/SessionLane.sol";
import {INodeRegistry} from "../src/interfaces/INodeRegistry.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

/// @dev One random step per function, by honest and hostile parties, on either lane. After each step `_audit` compares the contracts
/// with what may change; the first breach is kept in `breach`, because a failing step would only be skipped.
contract Handler is Base {
    FeeToken internal fee;
    ReentrantToken internal re;
    StubbornClient internal stubborn;
    TestVerifier internal verifier;
    TestArbiter internal arbiter;

    string public breach;
    /// @dev How often each step took effect, by name.
    mapping(string step => uint256) public did;

    address[] internal tokens;
    address[] internal clients;
    uint256[] internal clientKeys;
    address[] internal ids;
    mapping(address id => uint256 key) internal keyOf;
    address[] internal parties;
    bytes32[] internal sessionIds;
    mapping(bytes32 => SessionLane.SessionTerms) internal offers;
    mapping(bytes32 => uint128) internal lastPaid;
    mapping(bytes32 => bytes32) internal endedSession;
    mapping(uint256 => bytes32) internal endedJob;
    uint256 internal fresh = 0x1000;

    modifier step() {
        _;
        _audit();
    }

    constructor() {
        deployAll();
        fee = new FeeToken();
        re = new ReentrantToken(escrow);
        stubborn = new StubbornClient(address(escrow));
        verifier = new TestVerifier();
        arbiter = new TestArbiter();
        vm.prank(OWNER);
        proofs.setVerifier(1, keccak256("program"), address(verifier), "A test statement.");
        clients = [client, vm.addr(0xC2), address(stubborn)];
        clientKeys = [CLIENT_KEY, 0xC2, 0];
        tokens = [address(0), address(token), address(re)];
        for (uint256 i = 0; i < clients.length; ++i) {
            vm.deal(clients[i], 1e9 ether);
            parties.push(clients[i]);
            if (i != 0) token.transfer(clients[i], 100_000e6);
            re.transfer(clients[i], 1e24);
            fee.transfer(clients[i], 1e24);
            address[3] memory all = [address(token), address(re), address(fee)];
            for (uint256 k = 0; k < 3; ++k) {
                vm.prank(clients[i]);
                IERC20(all[k]).approve(address(escrow), type(uint256).max);
            }
        }
        parties.push(address(re));
        _track(hot, HOT_KEY, PAYOUT);
        _track(hot2, HOT2_KEY, PAYOUT2);
        vm.deal(ANYONE, 1e9 ether);
    }

    // Jobs

    function post(uint256 who, uint256 kind, uint128 amount, uint64 seed) external step {
        JobLane.JobTerms memory t = jobTerms(tokens[kind % 3], amount % 1e9 + 1);
        t.priceInPerMTok = seed % 3e12;
        t.priceOutPerMTok = seed % 7e11;
        t.claimBy = uint64(block.timestamp) + 10 + seed % 1200;
        t.deliverSecs = 10 + seed % 600;
        t.maxAttempts = uint8(1 + seed % 3);
        t.hostBond = uint128(seed % 5 * 0.1 ether);
        t.challengeBond = uint128(seed % 3 * 0.01 ether);
        if (seed % 4 != 0) (t.proofKind, t.programId) = (1, keccak256("program"));
        if (seed % 3 != 0) t.arbiter = address(arbiter);
        address c = clients[who % 3];
        bool ok = _as(c, t.token == address(0) ? t.maxAmount : 0, abi.encodeCall(escrow.postJob, (t, 0, "")));
        if (ok && escrow.paused()) _breach("posted while paused");
        if (ok) did["postJob"]++;
    }

    function postOfToken(uint128 amount) external step {
        try re.postOwnJob(jobTerms(address(re), amount % 1e9 + 1)) {
            did["token posts"]++;
        } catch {}
    }

    function postWithFeeToken(uint256 who, uint128 amount) external step {
        JobLane.JobTerms memory t = jobTerms(address(fee), amount % 1e9 + 100);
        if (_as(clients[who % 3], 0, abi.encodeCall(escrow.postJob, (t, 0, "")))) _breach("took a token with a fee");
        did["fee token refused"]++;
    }

    function claim(uint256 job, uint256 who) external step {
        address id = ids[who % ids.length];
        (uint256 jobId, JobLane.Job memory j) = _job(job, JobLane.JobState.Open);
        bool ok = _as(vm.addr(keyOf[id]), 0, abi.encodeCall(escrow.claimJob, (jobId)));
        if (!ok) return;
        did["claimJob"]++;
        if (nodes.node(id).state != INodeRegistry.NodeState.Active) _breach("an exiting node claimed");
        if (escrow.excluded(jobId, id)) _breach("an excluded node claimed");
        if (block.timestamp > j.deadline) _breach("claimed too late");
    }

    function deliver(uint256 job, uint64 a, uint64 b) external step {
        (uint256 jobId, JobLane.Job memory j) = _job(job, JobLane.JobState.Claimed);
        bool ok = _asHost(j.host, abi.encodeCall(escrow.submitResult, (jobId, bytes32(uint256(a)), bytes32(0), a % 1001, b % 1001, "")));
        if (ok) did["submitResult"]++;
    }

    function prove(uint256 job, uint8 how) external step {
        (uint256 jobId, JobLane.Job memory j) =
            _job(job, how % 4 != 0 ? JobLane.JobState.Delivered : JobLane.JobState.Challenged);
        bytes32 s = how % 5 == 0 ? bytes32(uint256(how)) : escrow.statementOf(jobId);
        bytes memory proof = how % 7 == 0 ? bytes("bad") : bytes("good");
        bool ok = _asHost(j.host, abi.encodeCall(escrow.submitProof, (jobId, abi.encode(s), proof)));
        if (!ok) return;
        did[j.state == JobLane.JobState.Challenged ? "submitProof challenged" : "submitProof"]++;
        if (how % 5 == 0 || how % 7 == 0) _breach("took a bad proof");
    }

    function abandon(uint256 job) external step {
        (uint256 jobId, JobLane.Job memory j) = _job(job, JobLane.JobState.Claimed);
        if (_asHost(j.host, abi.encodeCall(escrow.abandonJob, (jobId)))) did["abandonJob"]++;
    }

    function cancel(uint256 job) external step {
        (uint256 jobId, JobLane.Job memory j) = _job(job, JobLane.JobState.Open);
        if (j.client == address(re)) return;
        if (_as(j.client, 0, abi.encodeCall(escrow.cancelJob, (jobId)))) did["cancelJob"]++;
    }

    function accept(uint256 job, bool isProven) external step {
        (uint256 jobId, JobLane.Job memory j) = _job(job, isProven ? JobLane.JobState.Proven : JobLane.JobState.Delivered);
        if (_as(j.client, 0, abi.encodeCall(escrow.acceptResult, (jobId)))) did["acceptResult"]++;
    }

    function challenge(uint256 job, bool isProven) external step {
        (uint256 jobId, JobLane.Job memory j) = _job(job, isProven ? JobLane.JobState.Proven : JobLane.JobState.Delivered);
        if (j.client == address(re)) return;
        bool ok = _as(j.client, j.challengeBond, abi.encodeCall(escrow.challenge, (jobId, 1, 0)));
        if (!ok) return;
        did["challenge"]++;
        if (j.arbiter == address(0)) _breach("challenged without an arbiter");
    }

    function resolve(uint256 job, bool ready, bool hostWins, uint16 bps) external step {
        (uint256 jobId,) = _job(job, JobLane.JobState.Challenged);
        arbiter.decide(ready, hostWins, bps % 12_000);
        bool ok = _as(ANYONE, 0, abi.encodeCall(escrow.resolve, (jobId)));
        if (!ok) return;
        did[hostWins ? "resolve for host" : "resolve for client"]++;
        if (!ready || bps % 12_000 > 10_000) _breach("carried out a ruling that was none");
    }

    function expire(uint256 job) external step {
        uint256 n = escrow.nextJobId() - 1;
        if (n == 0) return;
        // An overdue one if there is any; every fourth time whichever comes, which must then be refused unless it is due.
        for (uint256 i = 0; i < n && job % 4 != 0; ++i) {
            uint256 id = 1 + (job % n + i) % n;
            JobLane.Job memory j = escrow.jobs(id);
            if (j.state < JobLane.JobState.Settled && block.timestamp > j.deadline) return _expire(id);
        }
        _expire(1 + job % n);
    }

    /// @dev Waits until a job in the given state is overdue, then ends it.
    function outlast(uint256 job, uint8 state) external step {
        (uint256 jobId, JobLane.Job memory j) = _job(job, state % 8 < 5 ? JobLane.JobState(1 + state % 8) : JobLane.JobState.Proven);
        if (j.state == JobLane.JobState.None || j.state >= JobLane.JobState.Settled) return;
        if (block.timestamp <= j.deadline) vm.warp(uint256(j.deadline) + 1);
        _expire(jobId);
    }

    // Sessions

    function open(uint256 who, uint256 host, uint256 kind, uint128 deposit, uint64 secs) external step {
        SessionLane.SessionTerms memory t = sessionTerms(tokens[kind % 3], deposit % 1e9 + 1, bytes32(fresh++));
        t.host = ids[host % ids.length];
        t.client = clients[who % 3];
        t.expiry = uint64(block.timestamp) + 10 + secs % 2000;
        t.settleWindowSecs = 10 + secs % 900;
        bytes memory sig = sign(keyOf[t.host], escrow.offerDigest(t));
        bool ok = _as(t.client, t.token == address(0) ? t.deposit : 0, abi.encodeCall(escrow.openSession, (t, sig)));
        if (!ok) return;
        if (escrow.paused()) _breach("opened while paused");
        did["openSession"]++;
        bytes32 id = keccak256(abi.encode(block.chainid, address(escrow), t.client, t.host, t.nonce));
        sessionIds.push(id);
        offers[id] = t;
        if (_as(t.client, t.token == address(0) ? t.deposit : 0, abi.encodeCall(escrow.openSession, (t, sig)))) {
            _breach("opened twice");
        }
    }

    function topUp(uint256 session, uint128 amount) external step {
        (bytes32 id, SessionLane.Session memory s) = _session(session);
        amount = amount % 1e9 + 1;
        bool ok = _as(s.client, s.token == address(0) ? amount : 0, abi.encodeCall(escrow.topUp, (id, amount)));
        if (ok) did["topUp"]++;
    }

    function settle(uint256 session, uint256 amount, bool forged) external step {
        (bytes32 id, SessionLane.Session memory s) = _session(session);
        SessionLane.Voucher memory v = _voucher(id, s, amount);
        bytes memory sig = _signed(v, s.client, forged);
        if (!_as(ANYONE, 0, abi.encodeCall(escrow.settle, (v, sig)))) return;
        did["settle"]++;
        if (forged || v.cumulativeAmount <= s.paid || v.cumulativeAmount > s.deposit) _breach("took a bad voucher");
    }

    function settleMany(uint256 first, uint256 amount, uint8 forgedMask) external step {
        SessionLane.Voucher[] memory v = new SessionLane.Voucher[](4);
        bytes[] memory sigs = new bytes[](4);
        for (uint256 i = 0; i < 4; ++i) {
            (bytes32 id, SessionLane.Session memory s) = _session(first / 2 + i);
            v[i] = _voucher(id, s, uint256(keccak256(abi.encode(amount, i))));
            sigs[i] = _signed(v[i], s.client, forgedMask >> i & 1 == 1);
        }
        if (!_as(ANYONE, 0, abi.encodeCall(escrow.settleMany, (v, sigs)))) _breach("a batch failed");
        did["settleMany"]++;
    }

    function settleAndClose(uint256 session, uint256 amount, bool wrongHost) external step {
        (bytes32 id, SessionLane.Session memory s) = _session(session);
        SessionLane.Voucher memory v = _voucher(id, s, amount);
        bytes memory sig = _signed(v, s.client, false);
        bool ok = wrongHost
            ? _as(ANYONE, 0, abi.encodeCall(escrow.settleAndClose, (v, sig)))
            : _asHost(s.host, abi.encodeCall(escrow.settleAndClose, (v, sig)));
        if (!ok) return;
        did["settleAndClose"]++;
        if (wrongHost) _breach("closed by a stranger");
    }

    function close(uint256 session, bool byHost) external step {
        (bytes32 id, SessionLane.Session memory s) = _session(session);
        bytes memory data = abi.encodeCall(escrow.closeSession, (id));
        if (byHost ? _asHost(s.host, data) : _as(s.client, 0, data)) did[byHost ? "close by host" : "close by client"]++;
    }

    function finalize(uint256 session) external step {
        (bytes32 id,) = _session(session);
        _finalize(id);
    }

    // Money, nodes, time, strangers

    function withdraw(uint256 who, uint256 kind, bool toItself) external step {
        address p = parties[who % parties.length];
        address t = tokens[kind % 3];
        uint256 owed = escrow.credits(t, p);
        if (p == address(re)) return;
        address to = toItself ? p : address(0xD00D);
        uint256 had = _balance(t, to);
        if (!_as(p, 0, abi.encodeCall(escrow.withdraw, (t, to)))) {
            if (owed != 0 && !toItself) _breach("a credit could not be withdrawn");
            return;
        }
        did["withdraw"]++;
        if (_balance(t, to) - had != owed) _breach("withdrew another amount");
    }

    function nodeStep(uint256 who, uint8 what) external step {
        address id = ids[who % ids.length];
        INodeRegistry.Node memory n = nodes.node(id);
        uint8 w = what % 16;
        if (w < 4) {
            if (_call(address(nodes), ANYONE, 1 ether, abi.encodeCall(nodes.addStake, (id)))) did["addStake"]++;
        } else if (w < 7) {
            uint256 key = fresh++;
            if (_call(address(nodes), n.payout, 0, abi.encodeCall(nodes.setHotKey, (id, vm.addr(key))))) {
                keyOf[id] = key;
                did["setHotKey"]++;
            }
        } else if (w < 9) {
            address payout = address(uint160(0xF000_0000 + fresh++));
            if (_call(address(nodes), n.payout, 0, abi.encodeCall(nodes.setPayout, (id, payout)))) {
                parties.push(payout);
                did["setPayout"]++;
            }
        } else if (w < 10) {
            if (_call(address(nodes), vm.addr(keyOf[id]), 0, abi.encodeCall(nodes.beginExit, (id)))) did["beginExit"]++;
        } else if (w < 13) {
            bool ok = _call(address(nodes), ANYONE, 0, abi.encodeCall(nodes.finishExit, (id)));
            if (!ok) return;
            did["finishExit"]++;
            if (n.locked != 0 || block.timestamp < n.exitAt) _breach("left too early");
        } else if (ids.length < 6) {
            uint256 key = fresh++;
            registerNode(vm.addr(key), address(uint160(0xF000_0000 + fresh)));
            _track(vm.addr(key), key, address(uint160(0xF000_0000 + fresh++)));
            did["register"]++;
        } else if (nodes.credits(n.payout) != 0) {
            if (!_call(address(nodes), n.payout, 0, abi.encodeCall(nodes.withdraw, (payable(address(0xD00D)))))) {
                _breach("stake could not be withdrawn");
            }
            did["registry withdraw"]++;
        }
    }

    function warp(uint32 secs, bool far) external step {
        vm.warp(block.timestamp + secs % (far ? 2 hours : 2 minutes));
        did["warp"]++;
    }

    function pause(uint8 odds) external step {
        bool paused = escrow.paused();
        if (!paused && odds % 4 != 0) return;
        vm.prank(OWNER);
        if (paused) escrow.unpause();
        else escrow.pause();
    }

    /// @dev Nobody in particular, the owner included, tries what is not theirs to do.
    function stranger(uint256 item, uint8 what, bool owner) external step {
        address who = owner ? OWNER : address(0xBAD);
        uint256 job = escrow.nextJobId() == 1 ? 0 : 1 + item % (escrow.nextJobId() - 1);
        (bytes32 id, SessionLane.Session memory s) = _session(item);
        SessionLane.Voucher memory v = _voucher(id, s, item);
        address node = ids[item % ids.length];
        bytes[14] memory tries = [
            abi.encodeCall(escrow.cancelJob, (job)),
            abi.encodeCall(escrow.claimJob, (job)),
            abi.encodeCall(escrow.abandonJob, (job)),
            abi.encodeCall(escrow.submitResult, (job, 0, 0, 1, 1, "")),
            abi.encodeCall(escrow.submitProof, (job, abi.encode(escrow.statementOf(job)), "good")),
            abi.encodeCall(escrow.acceptResult, (job)),
            abi.encodeCall(escrow.closeSession, (id)),
            abi.encodeCall(escrow.settleAndClose, (v, _signed(v, s.client, false))),
            abi.encodeCall(escrow.topUp, (id, 1)),
            abi.encodeCall(escrow.withdraw, (tokens[item % 3], who)),
            abi.encodeCall(nodes.slash, (node, 1, 1, job)),
            abi.encodeCall(nodes.unlockBond, (node, 1)),
            abi.encodeCall(nodes.setPayout, (node, who)),
            abi.encodeCall(nodes.withdraw, (payable(who)))
        ];
        uint256 k = what % 14;
        if (_call(k < 10 ? address(escrow) : address(nodes), who, 0, tries[k])) _breach("a stranger acted");
        // The hot key is a stranger to the stake.
        if (_call(address(nodes), vm.addr(keyOf[node]), 0, abi.encodeCall(nodes.setPayout, (node, who)))) {
            _breach("a hot key changed the payout");
        }
        did["stranger refused"]++;
    }

    // What must hold

    /// @dev Coin held is coin owed, in both contracts; locked stake is the bonds of jobs in work.
    function checkMoney() external view {
        uint256 jobs_ = escrow.nextJobId();
        for (uint256 k = 0; k < tokens.length; ++k) {
            address t = tokens[k];
            uint256 owed;
            for (uint256 i = 0; i < parties.length; ++i) owed += escrow.credits(t, parties[i]);
            for (uint256 i = 1; i < jobs_; ++i) {
                JobLane.Job memory j = escrow.jobs(i);
                if (j.token == t && j.state < JobLane.JobState.Settled) owed += j.maxAmount;
                if (t == address(0) && j.state == JobLane.JobState.Challenged) owed += j.challengeBond;
            }
            for (uint256 i = 0; i < sessionIds.length; ++i) {
                SessionLane.Session memory s = escrow.sessions(sessionIds[i]);
                if (s.token == t && s.state != SessionLane.SessionState.Settled) owed += s.deposit - s.paid;
            }
            eq(_balance(t, address(escrow)), owed, "escrow holds what it owes");
            eq(escrow.credits(t, OWNER) + escrow.credits(t, address(0xBAD)), 0, "strangers own nothing");
        }
        uint256 stakes;
        for (uint256 n = 0; n < ids.length; ++n) {
            INodeRegistry.Node memory node = nodes.node(ids[n]);
            uint256 bonds;
            for (uint256 i = 1; i < jobs_; ++i) {
                JobLane.Job memory j = escrow.jobs(i);
                if (j.host == ids[n] && j.state > JobLane.JobState.Open && j.state < JobLane.JobState.Settled) bonds += j.hostBond;
            }
            eq(node.locked, bonds, "locked stake is the bonds of jobs in work");
            yes(node.stake >= node.locked, "stake covers the bonds");
            stakes += node.stake;
        }
        for (uint256 i = 0; i < parties.length; ++i) stakes += nodes.credits(parties[i]);
        eq(address(nodes).balance, stakes, "registry holds what it owes");
        eq(re.entered(), 0, "nothing was entered from a token");
    }

    /// @dev Time alone ends everything: anyone can end each job and session, then all credits leave and nothing is left, paused or not.
    function drain() external {
        for (uint256 round = 0; round < 4; ++round) {
            vm.warp(block.timestamp + 2 hours);
            for (uint256 i = 1; i < escrow.nextJobId(); ++i) {
                if (escrow.jobs(i).state < JobLane.JobState.Settled) _expire(i);
            }
        }
        for (uint256 i = 0; i < sessionIds.length; ++i) _finalize(sessionIds[i]);
        vm.warp(block.timestamp + EXIT_DELAY);
        for (uint256 i = 0; i < ids.length; ++i) {
            INodeRegistry.Node memory n = nodes.node(ids[i]);
            if (n.state == INodeRegistry.NodeState.Active) _call(address(nodes), n.payout, 0, abi.encodeCall(nodes.beginExit, (ids[i])));
        }
        vm.warp(block.timestamp + EXIT_DELAY);
        for (uint256 i = 0; i < ids.length; ++i) {
            if (nodes.node(ids[i]).state == INodeRegistry.NodeState.Exiting) nodes.finishExit(ids[i]);
        }
        // A withdrawal of the reentrant token may cancel a job of its own, which credits it again: hence two rounds.
        for (uint256 round = 0; round < 2; ++round) {
            for (uint256 i = 0; i < parties.length; ++i) {
                address p = parties[i];
                for (uint256 k = 0; k < tokens.length; ++k) {
                    if (escrow.credits(tokens[k], p) == 0) continue;
                    if (p == address(re)) {
                        re.collect(tokens[k], address(0xD00D));
                    } else {
                        yes(_as(p, 0, abi.encodeCall(escrow.withdraw, (tokens[k], address(0xD00D)))), "withdraw");
                    }
                }
                if (nodes.credits(p) != 0) {
                    yes(_call(address(nodes), p, 0, abi.encodeCall(nodes.withdraw, (payable(address(0xD00D))))), "registry withdraw");
                }
            }
        }
        for (uint256 k = 0; k < tokens.length; ++k) eq(_balance(tokens[k], address(escrow)), 0, "left in the escrow");
        eq(address(nodes).balance, 0, "left in the registry");
        _audit();
        yes(bytes(breach).length == 0, breach);
    }

    function _audit() private {
        for (uint256 i = 1; i < escrow.nextJobId(); ++i) {
            JobLane.Job memory j = escrow.jobs(i);
            if (endedJob[i] != 0) {
                if (endedJob[i] != keccak256(abi.encode(j))) _breach("an ended job changed");
            } else if (j.state >= JobLane.JobState.Settled) {
                endedJob[i] = keccak256(abi.encode(j));
                did[j.state == JobLane.JobState.Settled ? "job settled" : "job refunded"]++;
            } else if (j.deadline == 0) {
                _breach("a job without a deadline");
            }
        }
        for (uint256 i = 0; i < sessionIds.length; ++i) {
            bytes32 id = sessionIds[i];
            SessionLane.Session memory s = escrow.sessions(id);
            if (s.paid < lastPaid[id]) _breach("paid went down");
            if (s.paid > s.deposit) _breach("paid above the deposit");
            lastPaid[id] = s.paid;
            if (endedSession[id] != 0) {
                if (endedSession[id] != keccak256(abi.encode(s))) _breach("an ended session changed");
            } else if (s.state == SessionLane.SessionState.Settled) {
                endedSession[id] = keccak256(abi.encode(s));
                did["session settled"]++;
            } else if (s.settleBy == 0) {
                _breach("a session without a deadline");
            }
        }
    }

    function _expire(uint256 jobId) private {
        JobLane.Job memory j = escrow.jobs(jobId);
        bool due = j.state < JobLane.JobState.Settled && block.timestamp > j.deadline;
        bool ok = _as(ANYONE, 0, abi.encodeCall(escrow.expire, (jobId)));
        if (ok != due) _breach(due ? "an overdue job did not end" : "a job ended before its time");
        string[6] memory names = ["", "Open", "Claimed", "Delivered", "Proven", "Challenged"];
        if (ok) did[string.concat("expire ", names[uint256(j.state)])]++;
    }

    function _finalize(bytes32 id) private {
        SessionLane.Session memory s = escrow.sessions(id);
        bool due = s.state != SessionLane.SessionState.None && s.state != SessionLane.SessionState.Settled && block.timestamp > s.settleBy;
        bool ok = _as(ANYONE, 0, abi.encodeCall(escrow.finalizeSession, (id)));
        if (ok != due) _breach(due ? "an overdue session did not end" : "a session ended before its time");
        if (ok) did["finalizeSession"]++;
    }

    function _breach(string memory what) private {
        if (bytes(breach).length == 0) breach = what;
    }

    function _track(address id, uint256 key, address payout) private {
        ids.push(id);
        keyOf[id] = key;
        parties.push(payout);
    }

    /// @dev A job in the wanted state if there is one among the last forty, from a random start; otherwise any.
    function _job(uint256 seed, JobLane.JobState wanted) private view returns (uint256 id, JobLane.Job memory j) {
        uint256 n = escrow.nextJobId() - 1;
        if (n == 0) return (0, j);
        for (uint256 i = 0; i < n && i < 40; ++i) {
            id = 1 + (seed % n + i) % n;
            j = escrow.jobs(id);
            if (j.state == wanted) return (id, j);
        }
    }

    function _session(uint256 seed) private view returns (bytes32 id, SessionLane.Session memory s) {
        uint256 n = sessionIds.length;
        if (n == 0) return (0, s);
        for (uint256 i = 0; i < n && i < 20; ++i) {
            id = sessionIds[(seed % n + i) % n];
            s = escrow.sessions(id);
            if (s.state != SessionLane.SessionState.Settled) return (id, s);
        }
    }

    function _voucher(bytes32 id, SessionLane.Session memory s, uint256 amount) private pure returns (SessionLane.Voucher memory v) {
        // Mostly a small step up, sometimes one down, sometimes above the deposit.
        uint256 span = uint256(s.deposit) + 2;
        uint256 sum = amount % 4 == 0 ? amount % span : uint256(s.paid) + amount % (span / 8 + 2);
        v = SessionLane.Voucher(id, s.host, uint128(sum), uint64(amount), uint64(amount >> 64), bytes32(amount));
    }

    function _signed(SessionLane.Voucher memory v, address by, bool forged) private returns (bytes memory) {
        bytes32 digest = escrow.voucherDigest(v);
        if (by == address(stubborn)) {
            stubborn.approve(digest, !forged);
            return "";
        }
        return sign(forged ? 0xBAD : by == clients[0] ? clientKeys[0] : clientKeys[1], digest);
    }

    function _as(address who, uint256 value, bytes memory data) private returns (bool ok) {
        if (who != address(stubborn)) return _call(address(escrow), who, value, data);
        (ok,) = who.call(abi.encodeCall(stubborn.act, (value, data)));
    }

    function _asHost(address id, bytes memory data) private returns (bool) {
        if (id == address(0)) return false;
        return _call(address(escrow), vm.addr(keyOf[id]), 0, data);
    }

    function _call(address to, address who, uint256 value, bytes memory data) private returns (bool ok) {
        vm.prank(who);
        (ok,) = to.call{value: value}(data);
    }

    function _balance(address t, address who) private view returns (uint256) {
        return t == address(0) ? who.balance : IERC20(t).balanceOf(who);
    }
}
