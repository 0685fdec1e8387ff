// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {Base} from "./Base.sol";
import {TestArbiter, TestVerifier} from "./Parties.sol";
import {Ledger} from "../src/Ledger.sol";
import {JobLane} from "../src/JobLane.sol";
import {NodeRegistry} from "../src/NodeRegistry.sol";
import {INodeRegistry} from "../src/interfaces/INodeRegistry.sol";

contract JobsTest is Base {
    TestVerifier internal verifier;
    TestArbiter internal arbiter;
    bytes32 internal constant PROGRAM = keccak256("program");

    function setUp() public {
        deployAll();
        verifier = new TestVerifier();
        arbiter = new TestArbiter();
        vm.prank(OWNER);
        proofs.setVerifier(1, PROGRAM, address(verifier), "A test statement.");
    }

    function post(JobLane.JobTerms memory t) internal returns (uint256) {
        vm.prank(client);
        return escrow.postJob{value: t.token == address(0) ? t.maxAmount : 0}(t, keccak256("input"), "ref");
    }

    function claim(uint256 id, address key) internal {
        vm.prank(key);
        escrow.claimJob(id);
    }

    function deliver(uint256 id, address key) internal {
        vm.prank(key);
        escrow.submitResult(id, keccak256("output"), 0, 100, 200, "result");
    }

    function prove(uint256 id) internal {
        bytes memory inputs = abi.encode(escrow.statementOf(id));
        vm.prank(hot);
        escrow.submitProof(id, inputs, "good");
    }

    function test_aTraceIsPartOfTheStatementAndKeepsItsBlock() public {
        uint256 plain = post(proven());
        claim(plain, hot);
        deliver(plain, hot);
        yes(escrow.jobs(plain).trace == 0 && escrow.jobs(plain).tracedAt == 0, "no trace");
        uint256 traced = post(proven());
        claim(traced, hot);
        uint256 before = vm.snapshotState();
        vm.prank(hot);
        escrow.submitResult(traced, keccak256("output"), keccak256("trace"), 100, 200, "result");
        yes(escrow.jobs(traced).trace == keccak256("trace") && escrow.jobs(traced).tracedAt == block.number, "trace and block");
        bytes32 one = escrow.statementOf(traced);
        vm.revertToState(before);
        vm.prank(hot);
        escrow.submitResult(traced, keccak256("output"), keccak256("another"), 100, 200, "result");
        yes(one != escrow.statementOf(traced), "another statement");
    }

    function terms() internal view returns (JobLane.JobTerms memory) {
        return jobTerms(address(0), 10_000);
    }

    function proven() internal view returns (JobLane.JobTerms memory t) {
        t = terms();
        t.proofKind = 1;
        t.programId = PROGRAM;
    }

    function arbitrated() internal view returns (JobLane.JobTerms memory t) {
        t = terms();
        t.arbiter = address(arbiter);
    }

    function state(uint256 id, JobLane.JobState s) internal view {
        eq(uint256(escrow.jobs(id).state), uint256(s), "state");
    }

    function wrongState(uint256 id, JobLane.JobState s) internal {
        vm.expectRevert(abi.encodeWithSelector(JobLane.JobWrongState.selector, id, s));
    }

    function money(uint256 toHost, uint256 toClient, uint256 stake) internal view {
        eq(escrow.credits(address(0), PAYOUT), toHost, "host");
        eq(escrow.credits(address(0), client), toClient, "client");
        eq(nodes.node(hot).stake, stake, "stake");
    }

    function unlocked() internal view {
        eq(nodes.node(hot).locked, 0, "locked");
    }

    function test_a_job_is_claimed_delivered_and_accepted() public {
        uint256 id = post(terms());
        eq(id, 1, "ids count from one");
        JobLane.Job memory j = escrow.jobs(id);
        yes(j.client == client && j.deadline == j.claimBy && j.maxAmount == 10_000 && j.hostBond == 0.5 ether, "stored");
        claim(id, hot);
        eq(nodes.node(hot).locked, 0.5 ether, "locked");
        eq(escrow.jobs(id).deadline, block.timestamp + 300, "deliverBy");
        deliver(id, hot);
        eq(escrow.jobs(id).deadline, block.timestamp + 900, "challengeBy");
        vm.prank(client);
        escrow.acceptResult(id);
        state(id, JobLane.JobState.Settled);
        // 100 * 1 + 200 * 3
        money(700, 9300, 5 ether);
        unlocked();
    }

    function test_a_job_paid_in_tokens_settles_without_its_client() public {
        uint256 id = post(jobTerms(address(token), 10_000));
        claim(id, hot);
        deliver(id, hot);
        vm.expectRevert(abi.encodeWithSelector(JobLane.DeadlineAhead.selector, block.timestamp, block.timestamp + 900));
        escrow.expire(id);
        vm.warp(block.timestamp + 901);
        vm.prank(ANYONE);
        escrow.expire(id);
        eq(escrow.credits(address(token), PAYOUT), 700, "host");
        eq(escrow.credits(address(token), client), 9300, "client");
        unlocked();
        vm.expectRevert(abi.encodeWithSelector(JobLane.JobWrongState.selector, id, JobLane.JobState.Settled));
        escrow.expire(id);
    }

    function test_price_rounds_up_and_is_capped(uint64 a, uint64 b, uint128 pa, uint128 pb, uint128 max) public {
        if (max == 0) max = 1;
        JobLane.JobTerms memory t = terms();
        (t.maxAmount, t.priceInPerMTok, t.priceOutPerMTok) = (max, pa, pb);
        vm.deal(client, max);
        uint256 id = post(t);
        uint256 exact = uint256(a) * pa + uint256(b) * pb;
        uint256 price = escrow.priceOf(id, a, b);
        yes(price <= max, "capped");
        if (price < max) yes(price * 1e6 >= exact && (price == 0 || (price - 1) * 1e6 < exact), "rounded up");
    }

    function badTerms(JobLane.JobTerms memory t, bytes memory error_) internal {
        vm.prank(client);
        vm.expectRevert(error_);
        escrow.postJob{value: t.token == address(0) ? t.maxAmount : 0}(t, 0, "");
    }

    function outOfBounds(bytes32 field, uint256 secs) internal pure returns (bytes memory) {
        return abi.encodeWithSelector(Ledger.DurationOutOfBounds.selector, field, secs, 10, 30 days);
    }

    function test_post_is_refused() public {
        JobLane.JobTerms memory t = terms();
        t.maxAmount = 0;
        badTerms(t, abi.encodeWithSelector(JobLane.ZeroAmount.selector));
        t = terms();
        t.claimBy = uint64(block.timestamp) + 9;
        badTerms(t, abi.encodeWithSelector(JobLane.ClaimByOutOfBounds.selector, t.claimBy, block.timestamp + 10, block.timestamp + 30 days));
        t = terms();
        t.deliverSecs = 30 days + 1;
        badTerms(t, outOfBounds("deliverSecs", 30 days + 1));
        t = terms();
        t.challengeSecs = 9;
        badTerms(t, outOfBounds("challengeSecs", 9));
        t = arbitrated();
        t.resolveSecs = type(uint64).max;
        badTerms(t, outOfBounds("resolveSecs", type(uint64).max));
        t = proven();
        t.proveSecs = 0;
        badTerms(t, outOfBounds("proveSecs", 0));
        t = proven();
        t.programId = 0;
        badTerms(t, abi.encodeWithSelector(JobLane.UnknownVerifier.selector, 1, bytes32(0)));
        t = terms();
        t.maxAttempts = 9;
        badTerms(t, abi.encodeWithSelector(JobLane.AttemptsOutOfBounds.selector, 9, 8));
        t.maxAttempts = 0;
        badTerms(t, abi.encodeWithSelector(JobLane.AttemptsOutOfBounds.selector, 0, 8));
        t = terms();
        vm.prank(client);
        vm.expectRevert(abi.encodeWithSelector(Ledger.WrongValue.selector, 9999, 10_000));
        escrow.postJob{value: 9999}(t, 0, "");
        string memory long = string(new bytes(16 * 1024 + 1));
        vm.prank(client);
        vm.expectRevert(abi.encodeWithSelector(JobLane.RefTooLong.selector, 16 * 1024 + 1, 16 * 1024));
        escrow.postJob{value: 10_000}(t, 0, long);
    }

    function test_cancel_is_for_the_client_of_an_open_job() public {
        uint256 id = post(terms());
        vm.prank(ANYONE);
        vm.expectRevert(abi.encodeWithSelector(JobLane.NotJobClient.selector, ANYONE, client));
        escrow.cancelJob(id);
        claim(id, hot);
        vm.prank(client);
        wrongState(id, JobLane.JobState.Claimed);
        escrow.cancelJob(id);
        id = post(terms());
        vm.prank(client);
        escrow.cancelJob(id);
        state(id, JobLane.JobState.Refunded);
        money(0, 10_000, 5 ether);
    }

    function test_claim_is_refused() public {
        uint256 id = post(terms());
        vm.prank(ANYONE);
        vm.expectRevert(abi.encodeWithSelector(JobLane.NotANode.selector, ANYONE));
        escrow.claimJob(id);
        claim(id, hot);
        vm.prank(hot2);
        wrongState(id, JobLane.JobState.Claimed);
        escrow.claimJob(id);
        JobLane.JobTerms memory t = terms();
        t.hostBond = 5 ether;
        id = post(t);
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.BondExceedsFreeStake.selector, 5 ether, 4.5 ether));
        escrow.claimJob(id);
        vm.prank(hot);
        nodes.beginExit(hot);
        t.hostBond = 0;
        id = post(t);
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(NodeRegistry.NodeNotActive.selector, hot, INodeRegistry.NodeState.Exiting));
        escrow.claimJob(id);
        vm.warp(t.claimBy + 1);
        vm.prank(hot2);
        vm.expectRevert(abi.encodeWithSelector(JobLane.DeadlinePassed.selector, t.claimBy + 1, t.claimBy));
        escrow.claimJob(id);
        escrow.expire(id);
        state(id, JobLane.JobState.Refunded);
    }

    function test_abandoning_costs_a_tenth_and_lets_others_claim() public {
        uint256 id = post(terms());
        claim(id, hot);
        vm.prank(hot2);
        vm.expectRevert(abi.encodeWithSelector(JobLane.NotJobHost.selector, hot2, hot));
        escrow.abandonJob(id);
        vm.prank(hot);
        escrow.abandonJob(id);
        state(id, JobLane.JobState.Open);
        money(0, 0.05 ether, 4.95 ether);
        unlocked();
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(JobLane.NodeExcluded.selector, id, hot));
        escrow.claimJob(id);
        claim(id, hot2);
        vm.prank(hot2);
        escrow.abandonJob(id);
        state(id, JobLane.JobState.Refunded);
        money(0, 0.1 ether + 10_000, 4.95 ether);
    }

    function test_not_delivering_costs_the_bond() public {
        uint256 id = post(terms());
        claim(id, hot);
        vm.warp(block.timestamp + 301);
        vm.prank(hot);
        vm.expectPartialRevert(JobLane.DeadlinePassed.selector);
        escrow.submitResult(id, 0, 0, 1, 1, "");
        vm.prank(hot);
        vm.expectPartialRevert(JobLane.DeadlinePassed.selector);
        escrow.abandonJob(id);
        escrow.expire(id);
        state(id, JobLane.JobState.Open);
        money(0, 0.5 ether, 4.5 ether);
        claim(id, hot2);
        vm.warp(block.timestamp + 1 hours);
        escrow.expire(id);
        state(id, JobLane.JobState.Refunded);
        money(0, 1 ether + 10_000, 4.5 ether);
    }

    function test_a_claim_lost_after_claim_by_refunds_at_once() public {
        uint256 id = post(terms());
        vm.warp(block.timestamp + 1 hours);
        claim(id, hot);
        vm.warp(block.timestamp + 301);
        escrow.expire(id);
        state(id, JobLane.JobState.Refunded);
    }

    function test_results_stay_within_the_terms() public {
        uint256 id = post(terms());
        claim(id, hot);
        vm.prank(hot2);
        vm.expectRevert(abi.encodeWithSelector(JobLane.NotJobHost.selector, hot2, hot));
        escrow.submitResult(id, 0, 0, 1, 1, "");
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(JobLane.TooManyTokens.selector, bytes32("inTokens"), 1001, 1000));
        escrow.submitResult(id, 0, 0, 1001, 1, "");
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(JobLane.TooManyTokens.selector, bytes32("outTokens"), 1001, 1000));
        escrow.submitResult(id, 0, 0, 1, 1001, "");
        string memory long = string(new bytes(513));
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(JobLane.RefTooLong.selector, 513, 512));
        escrow.submitResult(id, 0, 0, 1, 1, long);
        deliver(id, hot);
        vm.prank(hot);
        wrongState(id, JobLane.JobState.Delivered);
        escrow.submitResult(id, 0, 0, 1, 1, "");
    }

    function test_a_proof_must_state_this_job_and_pass() public {
        uint256 id = post(proven());
        claim(id, hot);
        bytes32 early = escrow.statementOf(id);
        vm.prank(hot);
        wrongState(id, JobLane.JobState.Claimed);
        escrow.submitProof(id, abi.encode(early), "good");
        deliver(id, hot);
        bytes32 s = escrow.statementOf(id);
        yes(s != early && uint256(s) >> 248 == 0, "statement binds the result and fits 248 bits");
        vm.prank(hot2);
        vm.expectRevert(abi.encodeWithSelector(JobLane.NotJobHost.selector, hot2, hot));
        escrow.submitProof(id, abi.encode(s), "good");
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(JobLane.WrongStatement.selector, early, s));
        escrow.submitProof(id, abi.encode(early), "good");
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(JobLane.WrongStatement.selector, bytes32(0), s));
        escrow.submitProof(id, "", "good");
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(JobLane.ProofRejected.selector, id, address(verifier)));
        escrow.submitProof(id, abi.encode(s), "bad");
        vm.prank(hot);
        vm.expectRevert("boom");
        escrow.submitProof(id, abi.encode(s), "boom");
        prove(id);
        state(id, JobLane.JobState.Proven);
        eq(escrow.jobs(id).deadline, block.timestamp + 900, "challengeBy");
        vm.warp(block.timestamp + 901);
        escrow.expire(id);
        money(700, 9300, 5 ether);
        unlocked();
    }

    function test_an_owed_proof_that_does_not_come_costs_amount_and_bond() public {
        uint256 id = post(proven());
        claim(id, hot);
        deliver(id, hot);
        vm.warp(block.timestamp + 601);
        bytes memory inputs = abi.encode(escrow.statementOf(id));
        vm.prank(hot);
        vm.expectPartialRevert(JobLane.DeadlinePassed.selector);
        escrow.submitProof(id, inputs, "good");
        escrow.expire(id);
        state(id, JobLane.JobState.Refunded);
        money(0, 0.5 ether + 10_000, 4.5 ether);
        unlocked();
    }

    function test_no_proof_is_taken_where_none_is_wanted() public {
        uint256 id = post(terms());
        claim(id, hot);
        deliver(id, hot);
        bytes memory inputs = abi.encode(escrow.statementOf(id));
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(JobLane.NoProofWanted.selector, id));
        escrow.submitProof(id, inputs, "good");
    }

    function test_challenge_is_refused() public {
        uint256 id = post(terms());
        claim(id, hot);
        vm.prank(client);
        wrongState(id, JobLane.JobState.Claimed);
        escrow.challenge{value: 0.2 ether}(id, 1, 0);
        deliver(id, hot);
        vm.prank(client);
        vm.expectRevert(abi.encodeWithSelector(JobLane.NoArbiter.selector, id));
        escrow.challenge{value: 0.2 ether}(id, 1, 0);
        id = post(arbitrated());
        claim(id, hot);
        deliver(id, hot);
        vm.deal(ANYONE, 1 ether);
        vm.prank(ANYONE);
        vm.expectRevert(abi.encodeWithSelector(JobLane.NotJobClient.selector, ANYONE, client));
        escrow.challenge{value: 0.2 ether}(id, 1, 0);
        vm.prank(client);
        vm.expectRevert(abi.encodeWithSelector(Ledger.WrongValue.selector, 0.1 ether, 0.2 ether));
        escrow.challenge{value: 0.1 ether}(id, 1, 0);
        vm.warp(block.timestamp + 901);
        vm.prank(client);
        vm.expectPartialRevert(JobLane.DeadlinePassed.selector);
        escrow.challenge{value: 0.2 ether}(id, 1, 0);
    }

    function challenged(JobLane.JobTerms memory t) internal returns (uint256 id) {
        id = post(t);
        claim(id, hot);
        deliver(id, hot);
        vm.prank(client);
        escrow.challenge{value: 0.2 ether}(id, 1, keccak256("evidence"));
        state(id, JobLane.JobState.Challenged);
    }

    function test_a_ruling_for_the_host_pays_it() public {
        uint256 id = challenged(arbitrated());
        vm.expectRevert("no ruling");
        escrow.resolve(id);
        arbiter.decide(true, true, 10_001);
        vm.expectRevert(abi.encodeWithSelector(JobLane.BadRuling.selector, 10_001, 10_000));
        escrow.resolve(id);
        arbiter.decide(true, true, 2500);
        escrow.resolve(id);
        state(id, JobLane.JobState.Settled);
        money(700 + 0.05 ether, 9300 + 0.15 ether, 5 ether);
        unlocked();
        wrongState(id, JobLane.JobState.Settled);
        escrow.resolve(id);
    }

    function test_a_ruling_for_the_client_refunds_it() public {
        uint256 id = challenged(arbitrated());
        arbiter.decide(true, false, 4000);
        escrow.resolve(id);
        state(id, JobLane.JobState.Refunded);
        money(0, 10_000 + 0.2 ether + 0.2 ether, 4.8 ether);
        unlocked();
    }

    function test_a_silent_arbiter_refunds_and_slashes_nobody() public {
        uint256 id = challenged(arbitrated());
        vm.warp(block.timestamp + 1201);
        arbiter.decide(true, true, 0);
        vm.expectPartialRevert(JobLane.DeadlinePassed.selector);
        escrow.resolve(id);
        escrow.expire(id);
        state(id, JobLane.JobState.Refunded);
        money(0, 10_000 + 0.2 ether, 5 ether);
        unlocked();
    }

    function test_a_challenged_host_wins_by_its_proof_when_nobody_rules() public {
        JobLane.JobTerms memory t = proven();
        t.arbiter = address(arbiter);
        uint256 id = challenged(t);
        prove(id);
        state(id, JobLane.JobState.Challenged);
        bytes memory inputs = abi.encode(escrow.statementOf(id));
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(JobLane.AlreadyProven.selector, id));
        escrow.submitProof(id, inputs, "good");
        vm.warp(block.timestamp + 1201);
        escrow.expire(id);
        state(id, JobLane.JobState.Settled);
        money(700 + 0.2 ether, 9300, 5 ether);
        unlocked();
    }

    function test_a_challenge_takes_nothing_from_the_time_to_prove() public {
        JobLane.JobTerms memory t = proven();
        t.arbiter = address(arbiter);
        t.resolveSecs = 10;
        uint256 id = challenged(t);
        eq(escrow.jobs(id).deadline, block.timestamp + 600, "proveBy");
        vm.warp(block.timestamp + 600);
        vm.expectPartialRevert(JobLane.DeadlineAhead.selector);
        escrow.expire(id);
        prove(id);
        vm.warp(block.timestamp + 1);
        escrow.expire(id);
        state(id, JobLane.JobState.Settled);
        money(700 + 0.2 ether, 9300, 5 ether);
        // What is proven already, and what needs no proof, is ruled on in the time of the terms.
        id = post(t);
        claim(id, hot);
        deliver(id, hot);
        prove(id);
        vm.prank(client);
        escrow.challenge{value: 0.2 ether}(id, 1, 0);
        eq(escrow.jobs(id).deadline, block.timestamp + 10, "resolveBy");
    }

    function test_a_challenged_host_that_owes_a_proof_loses_without_it() public {
        JobLane.JobTerms memory t = proven();
        t.arbiter = address(arbiter);
        uint256 id = challenged(t);
        vm.warp(block.timestamp + 1201);
        escrow.expire(id);
        state(id, JobLane.JobState.Refunded);
        money(0, 10_000 + 0.2 ether + 0.5 ether, 4.5 ether);
        unlocked();
    }

    function test_an_arbiter_without_code_leaves_the_deadline() public {
        JobLane.JobTerms memory t = terms();
        t.arbiter = address(0xDEAD);
        uint256 id = challenged(t);
        (bool ok,) = address(escrow).call(abi.encodeCall(escrow.resolve, (id)));
        yes(!ok, "no ruling from an empty address");
        vm.warp(block.timestamp + 1201);
        escrow.expire(id);
        state(id, JobLane.JobState.Refunded);
    }

    function test_accept_is_for_the_client_of_a_delivered_job() public {
        uint256 id = post(proven());
        vm.prank(client);
        wrongState(id, JobLane.JobState.Open);
        escrow.acceptResult(id);
        claim(id, hot);
        deliver(id, hot);
        vm.prank(hot);
        vm.expectRevert(abi.encodeWithSelector(JobLane.NotJobClient.selector, hot, client));
        escrow.acceptResult(id);
        vm.prank(client);
        escrow.acceptResult(id);
        money(700, 9300, 5 ether);
    }

    function test_payment_follows_the_payout_address_at_settlement() public {
        uint256 id = post(terms());
        claim(id, hot);
        deliver(id, hot);
        vm.prank(PAYOUT);
        nodes.setPayout(hot, address(0xCA7));
        vm.prank(client);
        escrow.acceptResult(id);
        eq(escrow.credits(address(0), address(0xCA7)), 700, "new payout");
    }
}
